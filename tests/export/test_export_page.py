"""The page about an export has facts that lead to their statements."""

import re

from sopdeploy.html.report import HtmlReport, Section, render
from sopdeploy_export.pack.model_card import _facts_table, _statements_table
from sopdeploy_export.prove.certificate import STATEMENTS


def test_each_fact_that_a_statement_proves_leads_to_it() -> None:
    facts = {"graph": "trained = plain", "types": "fp32", "numerical error": "1 rounding error"}
    tables = [_facts_table(facts), _statements_table()]
    page = render(HtmlReport(title="export", sections=[Section(title="proved", tables=tables)]))
    links = re.findall(r'<a href="#([\w-]+)">([^<]*)</a>', page)

    assert links == [("statement-graph", "Graph"), ("statement-file", "File")]

    ids = re.findall(r'<tr id="([\w-]+)">', page)
    assert len(ids) == len(set(ids)) == len(STATEMENTS)
    assert {name for name, _ in links} <= set(ids)

    sentences = [statement.STATEMENT for statement in STATEMENTS.values()]
    assert [text for text in sentences if text.replace("'", "&#39;") not in page] == []
