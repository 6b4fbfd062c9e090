"""Pages state measured numbers as `docs/benchmarks` has them."""

from typing import Any

import pytest

from tests.docs.reading import ROOT, module_at

RESULTS: Any = module_at(ROOT / "docs" / "generate_results.py")


def joined(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("claim", [text for one in RESULTS.measured() for text in one.texts()])
def test_the_readme_states_what_was_measured(claim: str) -> None:
    assert joined(claim) in joined((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "one", RESULTS.measured_on_pages(), ids=lambda one: f"{one.page}-{one.date}"
)
def test_a_page_states_what_was_measured(one: Any) -> None:
    page = (RESULTS.FOLDER / one.page).resolve()
    assert one.command
    assert one.date
    assert [
        text
        for text in one.texts()
        if joined(text) not in joined(page.read_text(encoding="utf-8"))
    ] == []
    assert page.read_text(encoding="utf-8") == RESULTS.page_with_tables(page), "run `make docs`"
    heads = [table.partition("\n")[0] for table in one.tables]
    assert [
        head for head in heads if page.read_text(encoding="utf-8").count(head + "\n") != 1
    ] == []


def test_every_measurement_names_a_page_that_exists() -> None:
    assert [
        one.page for one in RESULTS.measured() if not (RESULTS.FOLDER / one.page).exists()
    ] == []


def test_the_table_of_measurements_is_up_to_date() -> None:
    assert RESULTS.PAGE.read_text(encoding="utf-8") == RESULTS.results_page(), "run `make docs`"
