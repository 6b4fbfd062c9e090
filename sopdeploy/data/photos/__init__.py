"""Photographs of users: folders, names, labels, near-duplicates and splits."""
