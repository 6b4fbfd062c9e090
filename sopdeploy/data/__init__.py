"""Labeled images: data sources, augmentation and batches."""
