"""Modules of `second_order_gain.py`: cached maps, arms and their closed form, fine-tuning, runs in a file, tables."""
