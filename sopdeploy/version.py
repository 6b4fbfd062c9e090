"""The version of sopdeploy."""

__version__ = "0.3.0"
