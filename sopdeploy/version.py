"""The version of sopdeploy."""

__version__ = "0.0.0"
