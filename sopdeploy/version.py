"""The version of sopdeploy."""

__version__ = "0.4.0"
