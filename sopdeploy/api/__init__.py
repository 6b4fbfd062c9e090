"""The Python API: train, evaluate, export, predict, serve. The commands call the same functions."""
