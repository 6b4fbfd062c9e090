"""Pages state measured numbers as in `docs/benchmarks/results.toml`, and README.md states no others."""

import re
from typing import Any

import pytest

from tests.docs.reading import ROOT, module_at

RESULTS: Any = module_at(ROOT / "docs" / "generate_results.py")
README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"[\d.,]*\d(?: to [\d.,]*\d)?\s?(?:%|s|ms|MB|GB|points|times)(?![\w-])")
# What the code or its requirements fix, or what a sentence explains; not measured.
FIXED = ("95 %", "16 times", "4 times")


def joined(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("page", "claim"), [(one.stated, text) for one in RESULTS.measured() for text in one.texts()]
)
def test_the_page_states_what_was_measured(page: str, claim: str) -> None:
    assert joined(claim) in joined((ROOT / page).read_text(encoding="utf-8"))


def test_every_number_with_a_unit_in_the_readme_was_measured() -> None:
    text = joined(re.sub(r"```.*?```", "", README, flags=re.DOTALL))  # an example's output is no statement
    for claim in (text for one in RESULTS.measured() for text in one.texts()):
        text = text.replace(joined(claim), "")
    assert [number for number in NUMBER.findall(text) if number not in FIXED] == []


def test_every_measurement_names_a_page_that_exists() -> None:
    assert [one.page for one in RESULTS.measured() if not (RESULTS.FOLDER / one.page).exists()] == []


def test_the_table_of_measurements_is_up_to_date() -> None:
    assert RESULTS.PAGE.read_text(encoding="utf-8") == RESULTS.results_page(), "run `make docs`"
