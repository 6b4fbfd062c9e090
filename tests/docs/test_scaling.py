"""The tables of the capacity page equal the model's results; named programs and values exist."""

import re
import shlex

import capacity
import pytest

from tests.docs.reading import ROOT

PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^python benchmarks/capacity\.py (.*)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(
    "typed",
    [pytest.param(typed, marks=[] if "machine" in typed else pytest.mark.slow) for typed in SHOWN],
    ids=["GPUs", "CPUs", "machine"],
)
def test_a_table_equals_the_output_of_its_command(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    capacity.main(shlex.split(typed))
    assert f"{typed}\n```\n\n{capsys.readouterr().out}\n" in PAGE


@pytest.mark.parametrize("path", ["compose.yaml", "deploy/helm/sopdeploy/values-gpu.yaml", "docs/deploy.md"])
def test_promised_rates_are_those_of_the_table(path: str) -> None:
    table = "\n".join(capacity.machine())
    promises = re.findall(
        r"(\d+) cores(?: carry)? ([\d,]+)(?: JPEGs/s)?(?: of 500 x 375)?(?: or ([\d,]+) tensors/s)?",
        (ROOT / path).read_text(encoding="utf-8"),
    )
    assert promises
    for cores, jpegs, tensors in promises:
        for kind, rate in (("JPEG 500 x 375", jpegs), ("uint8 tensor over V2", tensors)):
            row = rf"^\| {kind} \| {cores} .* {rate} \| [a-z ]+ \|$"
            assert not rate or re.search(row, table, re.MULTILINE)
