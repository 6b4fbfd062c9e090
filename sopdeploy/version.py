"""The version of sopdeploy."""

__version__ = "0.2.0"
