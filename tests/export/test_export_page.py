"""The page about an export has its sentence as a heading, and a row for each statement."""

import re

from sopdeploy_export.pack.results import Exported
from sopdeploy_export.prove.certificate import STATEMENTS, STEPS


def test_the_page_is_headed_by_what_was_exported_and_lists_each_statement_once(
    branched: Exported,
) -> None:
    page = branched.page.read_text(encoding="utf-8")
    assert re.findall("<h1>(.*?)</h1>", page) == [branched.headline]
    checks = branched.checks()
    assert [check.statement for check in checks] == [*STATEMENTS] == [*STEPS]
    assert [check.evidence for check in checks] == [*branched.certificate.statements.values()]
    for check in checks:
        assert check.text.replace("'", "&#39;") in page
    assert all(check.holds for check in checks)


def test_accuracy_is_not_among_the_facts_of_an_export(branched: Exported) -> None:
    assert {"accuracy", "rejection", "log loss"}.isdisjoint(branched.facts())
