"""Import of published weight files of other projects; one module per project."""
