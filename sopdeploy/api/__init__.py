"""The Python API, from `train` to `serve`. The commands call the same functions."""
