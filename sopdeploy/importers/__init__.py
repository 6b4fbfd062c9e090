"""Published weight files of other projects, turned into checkpoints; one project, one file."""
