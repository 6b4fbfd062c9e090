"""The optimizers that a recipe can name."""
