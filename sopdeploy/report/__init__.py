"""`sopdeploy report`: one page on a training run, with everything in it."""

from sopdeploy.report.page import write_report

__all__ = ["write_report"]
