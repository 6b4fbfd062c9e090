"""A plug-in of sopdeploy: a pooling, a network, a data source and a runtime."""
