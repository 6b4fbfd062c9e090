"""Counts and outputs of every family match their golden; `make goldens` rewrites them."""

import json
from typing import Any

import pytest

from sopdeploy.models.describe import describe
from sopdeploy.models.registry import CATALOG
from tests.sweep.goldens import (
    FOLDER,
    GOLDENS,
    HEADS,
    golden,
    label,
    path_of,
    small_models,
    structure,
)
from tests.sweep.smallest import STRUCTURES

TOLERANCE = 1e-9  # kernels of other processors change the outputs in float64 by up to 5e-13


@pytest.mark.parametrize("family", [*GOLDENS, HEADS])
def test_counts_and_outputs_match_the_golden(family: str, pytestconfig: pytest.Config) -> None:
    found: dict[str, Any] = {label(small): golden(small) for small in small_models(family)}
    if pytestconfig.getoption("--rewrite-goldens"):
        path_of(family).parent.mkdir(exist_ok=True)
        path_of(family).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    expected = json.loads(path_of(family).read_text(encoding="utf-8"))

    assert found.keys() == expected.keys()
    for model, figures in found.items():
        outputs = figures.pop("outputs")
        printed = expected[model].pop("outputs")
        assert outputs.keys() == printed.keys(), model
        for output, values in printed.items():
            for row, row_printed in zip(outputs[output], values, strict=True):
                assert row == pytest.approx(row_printed, rel=TOLERANCE, abs=TOLERANCE), (
                    model,
                    output,
                )
        assert figures == expected[model]


def test_structures_match_the_golden(pytestconfig: pytest.Config) -> None:
    """Sections III to V of DSoP and section 4 of GSoP."""
    full_size = {
        f"{small.name} {json.dumps(dict(small.config))}": structure(small)
        for small in STRUCTURES
    }
    found = json.loads(json.dumps(full_size))
    if pytestconfig.getoption("--rewrite-goldens"):
        path_of("structures").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    assert found == json.loads(path_of("structures").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_counts_of_full_networks_match_the_golden(pytestconfig: pytest.Config) -> None:
    """In training; `test_counts` compares with printed figures, which have fewer digits."""
    found = {name: describe(name).training.model_dump() for name in CATALOG}
    if pytestconfig.getoption("--rewrite-goldens"):
        path_of("counts").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    assert found == json.loads(path_of("counts").read_text(encoding="utf-8"))


def test_every_family_has_a_golden() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == {
        *GOLDENS,
        HEADS,
        "counts",
        "structures",
    }
