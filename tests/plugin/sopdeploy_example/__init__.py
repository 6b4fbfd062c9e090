"""A plug-in of sopdeploy: one example for each group of entry points."""
