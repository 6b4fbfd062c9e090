"""Import of weight files and class names of other projects."""
