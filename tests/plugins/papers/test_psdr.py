"""PSDR: its chain of reductions, counts, outputs, and the export without auxiliary heads."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from sopdeploy import create_model, describe
from sopdeploy.errors import ConfigError
from tests.support.gpu_graphs import accepted
from tests.sweep.goldens import golden
from tests.sweep.smallest import NARROW
from tests.sweep.steps import Small, agreed, compared

NAMES = ("psdr-resnet50", "psdr-resnet50-no-aux")
GOLDEN = Path(__file__).parent / "goldens" / "psdr.json"
TOLERANCE = 1e-9  # kernels of other processors change the outputs in float64 by up to 5e-13


def small(name: str) -> Small:
    return Small(name, 32, {"depth": 18, **NARROW})


@pytest.mark.parametrize("name", NAMES)
def test_counts_and_outputs_match_the_golden(name: str) -> None:
    found = golden(small(name))
    expected: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    outputs = found.pop("outputs")
    printed = expected.pop("outputs")

    assert found == expected
    assert outputs.keys() == printed.keys()
    for output, rows in printed.items():
        for row, row_printed in zip(outputs[output], rows, strict=True):
            assert row == pytest.approx(row_printed, rel=TOLERANCE, abs=TOLERANCE), output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("psdr-resnet50", 32_211_576, 6_694_500_096),
        ("psdr-resnet50-no-aux", 27_967_400, 6_674_283_776),
    ],
)
def test_full_networks_have_the_counts_of_before(name: str, parameters: int, macs: int) -> None:
    found = describe(name)

    assert (found.training.parameters, found.training.macs) == (parameters, macs)
    assert sum(part.parameters for part in found.parts.values()) == parameters
    assert sum(part.macs for part in found.parts.values()) == macs


@pytest.mark.parametrize(
    ("config", "widths"),
    [
        ({}, [1024, 256]),
        ({"width": 128}, [1024, 256]),
        ({"decay": 0.5}, [1024, 512, 256, 128]),
        ({"width": 128, "decay": 0.5}, [1024, 512, 256]),
        ({"width": 256, "decay": 0.5}, [1024, 512]),
        ({"width": 100, "decay": 0.3}, [1024, 307]),
        # 2048 channels are halved to 1024, which is the width.
        ({"width": 1024, "decay": 0.5}, []),
    ],
)
def test_the_chain_has_the_widths_of_equation_4(
    config: dict[str, Any], widths: list[int]
) -> None:
    with torch.device("meta"):
        pooling: Any = create_model("psdr-resnet50", **config).pooling

    assert pooling.widths == widths
    assert len(pooling.chain) == len(widths) + 1


@pytest.mark.parametrize(
    ("name", "config", "key"),
    [
        ("psdr-resnet50", {"depth": 18, "width": 512}, "width"),
        ("psdr-resnet50", {"pooling": "isqrt"}, "pooling"),
        ("head:psdr-resnet50", {}, "psdr-resnet50"),
    ],
)
def test_options_that_psdr_cannot_have_are_a_config_error(
    name: str, config: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError, match=key), torch.device("meta"):
        create_model(name, **config)


@pytest.mark.slow
def test_the_file_agrees_with_the_network_and_gpu_runtimes_accept_it(tmp_path: Path) -> None:
    report = agreed(
        small("psdr-resnet50").trained(tmp_path / "ckpt.pt"), tmp_path / "model.onnx"
    )
    assert report.passed

    accepted(onnx.load(tmp_path / "model.onnx"), "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_trained_network_equals_the_plain_one(name: str, tmp_path: Path) -> None:
    compared(small(name).trained(tmp_path / "ckpt.pt"))
