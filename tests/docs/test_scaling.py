"""The tables of the capacity page equal the model's results; named programs and values exist."""

import re
import shlex
from typing import Any

import capacity
import pytest
import yaml

from sopdeploy_service.cores import decoders_per_process
from sopdeploy_service.settings import Settings
from tests.docs.reading import ROOT

PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^python benchmarks/capacity\.py (.*)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("typed", SHOWN, ids=["GPUs", "CPUs", "machine"])
def test_a_table_equals_the_output_of_its_command(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    capacity.main(shlex.split(typed))
    assert f"{typed}\n```\n\n{capsys.readouterr().out}\n" in PAGE


def test_cores_and_bandwidth_follow_from_bytes_and_times() -> None:
    rows = re.findall(r"^\| \d+ x \d+ \|(.*)\|$", PAGE, re.MULTILINE)
    assert len(rows) == 4
    engine = 2162
    for row in rows:
        size, exact, fast, *computed = (float(cell.replace(",", "")) for cell in row.split("|"))
        expected = (engine * exact / 1000, engine * fast / 1000, engine * size * 8 / 1e9)
        assert computed == [round(value, 1) for value in expected]


def test_every_named_benchmark_exists() -> None:
    programs = set(re.findall(r"`(benchmarks/\w+\.py)", PAGE))
    assert len(programs) >= 5
    assert [program for program in programs if not (ROOT / program).is_file()] == []


def test_every_named_chart_value_exists() -> None:
    chart: Any = yaml.safe_load((ROOT / "deploy/helm/sopdeploy/values.yaml").read_text(encoding="utf-8"))
    rows = PAGE.partition("## On Kubernetes")[2]
    named = set(re.findall(r"`((?:autoscaling|resources|settings)\.[\w.]+|replicas|maxSurge)`", rows))
    named |= set(re.findall(r"--set(?:-string)? ([\w.]+)=", rows))
    assert len(named) >= 9
    for path in named:
        if path.startswith("settings."):
            assert path.removeprefix("settings.SOPDEPLOY_").lower() in Settings.model_fields
            continue
        value = chart
        for part in path.split("."):
            value = value[part]


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


def test_the_chart_for_gpus_has_the_decoders_of_the_table() -> None:
    chart: Any = yaml.safe_load((ROOT / "deploy/helm/sopdeploy/values-gpu.yaml").read_text(encoding="utf-8"))
    front_ends = int(chart["settings"]["SOPDEPLOY_FRONT_ENDS"])
    cores = int(chart["resources"]["requests"]["cpu"])
    assert (front_ends, cores) == (4, 16)
    assert int(chart["settings"]["SOPDEPLOY_DECODERS"]) == decoders_per_process(cores, front_ends)
