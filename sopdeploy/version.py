"""The version of sopdeploy."""

__version__ = "0.1.0"
