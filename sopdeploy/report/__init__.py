"""The HTML page that `sopdeploy train` writes about a run, and labels that are probably wrong."""
