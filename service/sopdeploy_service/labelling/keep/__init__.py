"""Photographs that are worth a label: which to keep, and the folder that holds them."""
