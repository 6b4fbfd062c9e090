"""The page of a bundle that a person looks at: `report.html`, one file with its pictures in it."""

from sopdeploy_export.report.page import render

__all__ = ["render"]
