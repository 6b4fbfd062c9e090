"""Every model trains a step, is saved, loaded, detached, certified and exported.

The default run lowers and detaches one network. With `--slow`, it lowers one of every inference
class, builds its fp32 and int8 graphs with a real TensorRT parser, and detaches one of every class
of network. `make test-nightly` also builds the half precisions, exports every class, and every name
at its full width.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from sopdeploy.bundle.manifest import Precision
from sopdeploy.errors import LoweringError
from sopdeploy.models.registry import CATALOG, entry
from sopdeploy_export.capture.deployed import generated_images
from sopdeploy_export.export_checkpoint import export_checkpoint
from sopdeploy_export.lower.float16 import float32_parts
from sopdeploy_export.lower.int8 import Int8Quantizer
from sopdeploy_export.options import ExportOptions
from tests.sopdeploy.training.small_recipes import few_blocks
from tests.support.gpu_graphs import accepted
from tests.support.slow import mostly_slow
from tests.sweep.smallest import ALL, DETACHED, LOWERED, TOO_LONG, WALKED
from tests.sweep.steps import Small, agreed, compared, exported

OUTPUTS = {
    "gmsop": {"logits", "gates"},
    "gmgap": {"logits", "gates"},
    "sgmoe": {"logits", "gates"},
}
BY_EIGENVALUES = ("mpncov-", "deepo2p-", "improved-bcnn-", "g2denet-")
# Their operators are those of others here: `gsop-net2` contains the root of the first, and
# `export/lower/test_int8.py` builds both graphs of `gmsop`, whose mixture the next two have, for
# GPUs. `gsop-net1` has the block of `gsop-net2`.
COVERED = (
    "resnet8",
    "gmsop-16-8-resnet18",
    "gmgap-16-8-resnet18",
    "avesop-16-resnet18",
    "gsop-net1-resnet26",
    "resnext29-8x64d",
)
QUICK = ("dsop-preact-resnet110", "dsop-resnet8")  # without `--slow`
OF_TIMM = (Small("timm:efficientnet_lite0", 64), Small("timm:vit_tiny_patch16_224", 224))
NEEDS_EIGENVALUES = {name for name in CATALOG if name.startswith(BY_EIGENVALUES)}


def name(small: Small) -> str:
    return small.name


def as_parameters(networks: Iterable[Small]) -> list[Any]:
    """Mark the networks in `COVERED` as nightly, and the others that are not `QUICK` as slow."""
    parameters = []
    for small in networks:
        mark = pytest.mark.nightly if small.name in COVERED else pytest.mark.slow
        marks = [] if small.name in QUICK else [mark]
        parameters.append(pytest.param(small, id=small.name, marks=marks))
    return parameters


def narrow(small: Small) -> Small:
    """Reduce the channels of a ResNet to a quarter, stages to one block; its golden has more."""
    fields = entry(small.name).config.model_fields
    least = {
        key: value for key, value in {"base_width": 16, "blocks": 1}.items() if key in fields
    }
    return small._replace(config={**small.config, **least})


def outputs_of(model: str) -> set[str]:
    return OUTPUTS.get(model.partition("-")[0], {"logits"})


@pytest.mark.parametrize("small", as_parameters((*LOWERED, *WALKED)))
def test_the_smallest_agrees_with_its_onnx_file_which_gpu_runtimes_accept(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_blocks(monkeypatch)
    small = narrow(small)
    report = agreed(small.trained(tmp_path / "ckpt.pt"), tmp_path / "model.onnx")

    assert report.passed
    assert set(report.outputs) == outputs_of(small.name)

    model = onnx.load(tmp_path / "model.onnx")
    accepted(model, "fp32")
    network = small.build()
    images = generated_images(small.side)[:4]
    kept = float32_parts(network)
    quantizer = Int8Quantizer(model, images, kept, "tensorrt")
    accepted(quantizer.quantize(), "int8")


@pytest.mark.parametrize("small", as_parameters(DETACHED))
def test_the_smallest_equals_the_plain_network_after_a_step(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_blocks(monkeypatch)
    compared(narrow(small).trained(tmp_path / "ckpt.pt"))


def test_every_class_of_network_and_config_has_its_smallest() -> None:
    swept = {(entry(small.name).network, entry(small.name).config) for small in ALL}
    assert {(line.network, line.config) for line in CATALOG.values()} <= swept


def shipped_class(small: Small) -> type:
    with torch.device("meta"):
        return type(small.build().inference_model())


def test_every_inference_class_is_lowered() -> None:
    lowered = {
        parent for small in (*WALKED, *LOWERED) for parent in shipped_class(small).__mro__
    }
    assert {shipped_class(small) for small in DETACHED} - lowered == set(TOO_LONG)


@pytest.mark.parametrize(
    "pooling", mostly_slow(["mpncov", "deepo2p", "improved-bcnn", "g2denet"], "mpncov")
)
def test_a_pooling_without_an_onnx_form_trains_but_is_not_exported(
    pooling: str, tmp_path: Path
) -> None:
    checkpoint = Small("resnet8", 16, {"pooling": {"kind": pooling}}).trained(
        tmp_path / "ckpt.pt"
    )

    with pytest.raises(LoweringError, match=r"exported: .* train"):
        export_checkpoint(checkpoint, tmp_path / "bundles", options=ExportOptions())
    assert not (tmp_path / "bundles").exists()


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("small", ALL, ids=name)
def test_the_smallest_is_certified(small: Small, tmp_path: Path) -> None:
    found = exported(small.trained(tmp_path / "ckpt.pt"), tmp_path / "bundles")

    assert found.parity.passed
    assert set(found.parity.outputs) == outputs_of(small.name)
    assert found.certificate.roots.onnx


@pytest.mark.nightly
@pytest.mark.parametrize(
    "small",
    [*WALKED, *LOWERED, *OF_TIMM, Small("efficientnet-lite0", 64)],
    ids=lambda s: f"{s.name}-{s.side}",
)
def test_the_smallest_agrees_in_half_precision(small: Small, tmp_path: Path) -> None:
    report = agreed(small.trained(tmp_path / "ckpt.pt"), tmp_path / "model.onnx", "fp16")
    assert report.passed
    assert report.precision == "fp16"

    accepted(onnx.load(tmp_path / "model.onnx"), "fp16")


@pytest.mark.parametrize(
    ("pooling", "precision"),
    [
        pytest.param("bcnn", "fp32", marks=pytest.mark.slow),
        pytest.param("bcnn", "fp16", marks=pytest.mark.nightly),
        pytest.param("bcnn", "int8", marks=pytest.mark.nightly),
        pytest.param("gap", "fp32", marks=pytest.mark.nightly),
        pytest.param("gap", "fp16", marks=pytest.mark.nightly),
        pytest.param("gap", "int8", marks=pytest.mark.nightly),
    ],
)
def test_every_other_pooling_agrees(pooling: str, precision: Precision, tmp_path: Path) -> None:
    small = Small("resnet8", 16, {"pooling": pooling})
    wanted: Precision = "fp32" if precision == "int8" else precision
    assert agreed(small.trained(tmp_path / "ckpt.pt"), tmp_path / "model.onnx", wanted).passed

    model = onnx.load(tmp_path / "model.onnx")
    if precision == "int8":
        images = generated_images(small.side)[:4]
        kept = float32_parts(small.build())
        model = Int8Quantizer(model, images, kept, "tensorrt").quantize()
    accepted(model, precision)


def full_width(model: str) -> Small:
    """Return *model* with the catalog's options, on smaller images than its paper's."""
    # With all 18 blocks per stage, one step leaves logits of which rounding changes up to 65 %.
    options = (
        {"blocks": 12}
        if model in ("gsop-net1-preact-resnet164", "gsop-net2-preact-resnet164")
        else {}
    )
    return Small(model, {224: 64, 64: 32}.get(CATALOG[model].image_size, 32), options)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "model", [model for model in CATALOG if model not in NEEDS_EIGENVALUES]
)
def test_every_name_agrees_at_full_width(model: str, tmp_path: Path) -> None:
    report = agreed(full_width(model).trained(tmp_path / "ckpt.pt"), tmp_path / "model.onnx")

    assert report.passed
    assert set(report.outputs) == outputs_of(model)
