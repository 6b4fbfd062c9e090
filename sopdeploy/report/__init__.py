"""HTML reports on training runs (`sopdeploy report`)."""

from sopdeploy.report.page import write_report

__all__ = ["write_report"]
