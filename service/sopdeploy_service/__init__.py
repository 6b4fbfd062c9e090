"""Verify a bundle, classify images with it, and serve it over HTTP. Does not import torch."""
