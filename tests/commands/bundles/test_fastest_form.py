"""The fastest form of a bundle on this processor: what is measured, and what is said."""

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.sealed import SealedFile
from sopdeploy.errors import ParityError
from sopdeploy_commands.bundles import fastest_form
from sopdeploy_commands.bundles.fastest_form import (
    BundleForm,
    describe_fastest_form,
    measure_forms,
)
from sopdeploy_service.runtime import openvino, own
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.runtime.openvino import OpenVINORuntime
from tests.support.forged import graph

ORT, ORT8 = BundleForm("fp32", "ONNX Runtime"), BundleForm("int8", "ONNX Runtime")
VINO, VINO8 = BundleForm("fp32", "OpenVINO"), BundleForm("int8", "OpenVINO")


@pytest.fixture(autouse=True)
def two_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the project have two runtimes for CPUs, whichever others it has."""
    monkeypatch.setattr(
        own, "OWN", {"onnxruntime-cpu": OnnxRuntime, "openvino": OpenVINORuntime}
    )


HERE, OPENVINO = "faster on this processor:", "serve with --runtime openvino"
INT8 = "export with --precision int8 --calibrate PHOTOS"
FASTEST = {
    f"int8 with OpenVINO: 2.5 x {HERE} {INT8}, {OPENVINO}": {
        ORT: 10.0,
        VINO: 9.0,
        ORT8: 8.0,
        VINO8: 4.0,
    },
    f"int8 with ONNX Runtime: 1.2 x {HERE} {INT8}": {ORT: 10.0, VINO: 9.0, ORT8: 8.0},
    f"fp32 with OpenVINO: 2.0 x {HERE} {OPENVINO}": {ORT: 10.0, VINO: 5.0},
    "this bundle with ONNX Runtime is the fastest form on this processor": {
        ORT: 10.0,
        VINO: 9.5,
        ORT8: 11.0,
    },
    f"int8 with OpenVINO: 2.5 x {HERE} {OPENVINO}": {ORT8: 10.0, VINO8: 4.0},
}


@pytest.mark.parametrize(("expected", "milliseconds"), FASTEST.items())
def test_the_fastest_form_is_named_with_the_options_that_give_it(
    bundle: Bundle, monkeypatch, milliseconds, expected
) -> None:
    precision = next(iter(milliseconds)).precision
    monkeypatch.setattr(
        fastest_form,
        "measure_forms",
        lambda _: {form: [value] for form, value in milliseconds.items()},
    )
    monkeypatch.setattr(OpenVINORuntime, "is_set_up", lambda: True)
    shipped = replace(
        bundle, manifest=bundle.manifest.model_copy(update={"precision": precision})
    )
    assert describe_fastest_form(shipped) == expected
    monkeypatch.setattr(OpenVINORuntime, "is_set_up", lambda: False)
    hint = '(OpenVINO is not installed; run: pip install "sopdeploy[openvino]")'
    assert describe_fastest_form(shipped) == f"{expected} {hint}"


# Of the two convolutions, the one that reads the image stays in float32.
CONVOLUTIONS = """
convolutions (uint8[n, 32, 32, 3] images) => (float[n, 7] logits)
<float[8, 3, 3, 3] first, float[7, 8, 3, 3] second>
{
    wide = Cast <to = 1> (images)
    planes = Transpose <perm = [0, 3, 1, 2]> (wide)
    a = Conv (planes, first)
    r = Relu (a)
    b = Conv (r, second)
    pooled = GlobalAveragePool (b)
    logits = Flatten (pooled)
}
"""


def test_a_graph_that_cannot_be_quantized_is_measured_in_float32(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise ParityError("the quantizer can raise anything")

    monkeypatch.setattr(fastest_form, "Int8Quantizer", fail)
    monkeypatch.setattr(fastest_form, "measure_alternately", lambda runs: runs)
    assert {form.precision for form in measure_forms(bundle)} == {"fp32"}


@pytest.mark.parametrize("lacks_vnni", [True, False])
def test_float32_and_int8_are_measured_where_they_are_exact_and_the_bundle_stays(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, lacks_vnni: bool
) -> None:
    if find_spec("openvino") is None:  # importing it here would start its telemetry
        pytest.skip("OpenVINO is not installed")
    monkeypatch.setattr(openvino, "lacks_vnni", lambda: lacks_vnni)
    monkeypatch.setattr(fastest_form, "MEASURED_SECONDS", 0.0)
    shapes, random = {"first": (8, 3, 3, 3), "second": (7, 8, 3, 3)}, np.random.default_rng(0)
    weights = {
        name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()
    }
    before = graph(CONVOLUTIONS, **weights).SerializeToString()
    with_convolutions = replace(bundle, graph=SealedFile([before]))
    exact = {ORT8} if lacks_vnni else {ORT8, VINO8}
    assert measure_forms(with_convolutions).keys() == {ORT, VINO, *exact}
    assert with_convolutions.onnx.read() == before
    assert measure_forms(bundle).keys() == {ORT, VINO}, "without a convolution there is no int8"
