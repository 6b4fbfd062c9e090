"""Reproduce the tables of the papers (`sopdeploy reproduce`)."""

from sopdeploy.reproduction.tables import TABLES, PrintedRow, PrintedTable, find_table

__all__ = ["TABLES", "PrintedRow", "PrintedTable", "find_table"]
