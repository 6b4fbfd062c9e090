"""Reproduce the tables of the papers (`sopdeploy reproduce`)."""
