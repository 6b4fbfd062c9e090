"""Engines built with torch-tensorrt from the exported program."""

import io
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sopdeploy.bundle.folder import Bundle
from sopdeploy.cli.app import app
from sopdeploy.errors import EngineError, ParityError, RuntimeUnavailableError
from sopdeploy.tensorrt.cache import records
from sopdeploy_export.tensorrt.engine import EngineOptions, get_engine
from sopdeploy_export.tensorrt.plan import plan_engine
from sopdeploy_service.runtime.tensorrt import TensorRTRuntime
from sopdeploy_service.settings import Settings
from tests.tensorrt.fake_tensorrt import MAGIC, FakeTensorRT
from tests.tensorrt.networks import network, outputs_of, some_images, write

Install = Callable[..., FakeTensorRT]
DRY = ["engine", "--dry-run", "--via", "torch-tensorrt"]
VIA = EngineOptions(via="torch-tensorrt")


class Pixels(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(1, 2))


@cache
def pixels_program() -> bytes:
    memory = io.BytesIO()
    program = torch.export.export(Pixels(), (torch.zeros(2, 8, 8, 3, dtype=torch.uint8),))
    program.example_inputs = None
    torch.export.save(program, memory)
    return memory.getvalue()


class FakeTorchTensorRT(ModuleType):
    """Builds plans of the test network; outputs have numbers as names, as in torch-tensorrt."""

    def __init__(self, trt: FakeTensorRT) -> None:
        super().__init__("torch_tensorrt")
        self.trt, self.asked, self.program = trt, {}, None
        self.fault = ""
        self.Input = SimpleNamespace
        self.dynamo = SimpleNamespace(convert_exported_program_to_serialized_trt_engine=self.convert)

    def convert(self, program: Any, *, arg_inputs: Any, **settings: Any) -> bytes:
        if self.fault == "none":
            raise NotImplementedError("no converter for aten.foo\nand a page of graph")
        self.program, self.asked = program, {"images": arg_inputs[0], **settings}
        model = network(half=self.fault == "wrong")
        for node in model.graph.node:
            node.output[:] = ["output0" if name == "logits" else name for name in node.output]
        model.graph.output[0].name = "output0"
        sizes = (arg_inputs[0].min_shape, arg_inputs[0].opt_shape, arg_inputs[0].max_shape)
        types = self.fault if self.fault in {"Half", "Int32"} else "Float"
        border = [{"Name": "x", "Format/Datatype": types}]
        layer = {"Name": "[CONVOLUTION]-[aten_ops.convolution.default]-[conv2d]", "LayerType": "Cask"}
        facts = {"profiles": [sizes], "layers": [{**layer, "Inputs": border, "Outputs": border}]}
        head = MAGIC + self.trt._version.encode() + b"\n" + json.dumps(facts).encode() + b"\n"
        return head + bytes(model.SerializeToString())


@pytest.fixture
def torch_tensorrt(install: Install, monkeypatch: pytest.MonkeyPatch) -> FakeTorchTensorRT:
    fake = FakeTorchTensorRT(install())
    monkeypatch.setitem(sys.modules, "torch_tensorrt", fake)
    return fake


@pytest.fixture
def bundle_pt2(tmp_path: Path) -> Bundle:
    return write(tmp_path, program=pixels_program())


def test_the_engine_is_built_cached_and_served(torch_tensorrt: FakeTorchTensorRT, bundle_pt2: Bundle) -> None:
    built = get_engine(bundle_pt2, VIA)
    key = built.record.key
    assert (key.via, key.precision, str(*key.profiles)) == ("torch-tensorrt", "fp32", "1-16")
    assert built.record.receipt.parts["network"].realised == {"fp32": 1}
    assert [replay.batch for replay in built.record.replays] == [1, 16]
    assert built.record.parsed_onnx_sha256 == bundle_pt2.manifest.files["network.pt2"].sha256
    assert get_engine(bundle_pt2, VIA).reason is None
    images = some_images(3)
    found = TensorRTRuntime(bundle_pt2, Settings(runtime="tensorrt")).run(images)
    assert found["logits"] == pytest.approx(outputs_of(network(), images), rel=1e-4, abs=1e-3)


def test_the_builder_gets_no_tf32_no_fallback_and_one_batch_range(
    torch_tensorrt: FakeTorchTensorRT, bundle_pt2: Bundle
) -> None:
    get_engine(bundle_pt2, EngineOptions(via="torch-tensorrt", level=4, profiles="2,8"))
    asked, images = torch_tensorrt.asked, torch_tensorrt.asked["images"]
    assert isinstance(torch_tensorrt.program, torch.export.ExportedProgram)
    assert (asked["disable_tf32"], asked["require_full_compilation"]) == (True, True)
    assert (asked["optimization_level"], asked["workspace_size"]) == (4, 2**28)
    shapes = [images.min_shape, images.opt_shape, images.max_shape]
    assert shapes == [(size, 8, 8, 3) for size in (1, 4, 8)]
    assert images.dtype is torch.uint8


@pytest.mark.usefixtures("torch_tensorrt")
def test_engines_from_onnx_and_from_torch_have_different_keys(bundle_pt2: Bundle) -> None:
    first, second = get_engine(bundle_pt2, EngineOptions()), get_engine(bundle_pt2, VIA)
    assert first.path.parent == second.path.parent
    assert first.path != second.path
    assert {record.key.via for record in records(first.path.parent)} == {"onnx", "torch-tensorrt"}
    assert "via" not in json.loads(first.path.with_suffix(".json").read_bytes())["key"]


WRONG = {
    "another precision": ("Half", "network: layer .* computes with fp16, the graph asks for fp32"),
    "no precision": ("Int32", "shows no floating type"),
    "no converter": ("none", "cannot build the engine: no converter for aten.foo and a page of graph$"),
    "other numbers": ("wrong", "probes: output 'logits' deviates"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_engine_is_not_kept(
    torch_tensorrt: FakeTorchTensorRT, bundle_pt2: Bundle, tmp_path: Path, case: str
) -> None:
    torch_tensorrt.fault, message = WRONG[case]
    with pytest.raises(ParityError if case == "other numbers" else EngineError, match=message):
        get_engine(bundle_pt2, VIA)
    assert not list(tmp_path.rglob("*.plan"))


@pytest.mark.parametrize(
    ("fields", "program", "asked", "message"),
    [
        ({}, False, None, "has no network.pt2; export it with --pt2"),
        ({"precision": "fp16"}, True, None, "builds only fp32, the bundle is fp16; omit --via"),
        ({}, True, "fp16", "builds only fp32, fp16 was requested; omit --precision"),
    ],
)
@pytest.mark.parametrize("ask", [get_engine, plan_engine])
def test_a_bundle_that_torch_tensorrt_cannot_build_is_rejected(
    tmp_path: Path, ask: Any, fields: dict[str, str], program: bool, asked: str | None, message: str
) -> None:
    bundle = write(tmp_path, program=pixels_program() if program else None, **fields)
    with pytest.raises(EngineError, match=message):
        ask(bundle, EngineOptions(via="torch-tensorrt", precision=asked))


def test_the_dry_run_shows_the_program_and_needs_no_tensorrt(
    bundle_pt2: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorrt", "torch_tensorrt", "cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)
    found = CliRunner().invoke(app, [*DRY, str(bundle_pt2.path)])
    assert found.exit_code == 0, found.stderr
    assert ", fp32, by torch-tensorrt" in found.stdout
    assert "batches 1-16" in found.stdout
    assert f"sha256 {bundle_pt2.manifest.files['network.pt2'].sha256[:16]}" in found.stdout
    assert 'run: pip install "sopdeploy[torch-tensorrt]"' in found.stdout
    assert "key       not known: TensorRT is not installed" in found.stdout
    assert "lint" not in found.stdout


@pytest.mark.usefixtures("torch_tensorrt")
def test_the_dry_run_computes_the_key_of_the_build(bundle_pt2: Bundle) -> None:
    planned = json.loads(CliRunner().invoke(app, [*DRY, str(bundle_pt2.path), "--json"]).stdout)
    assert (planned["memory"], planned["lint"]) == (None, [])
    assert planned["key"] == get_engine(bundle_pt2, VIA).record.key.name
    assert planned["key"] != plan_engine(bundle_pt2, EngineOptions()).key


def test_without_torch_tensorrt_the_error_says_how_to_install_it(
    torch_tensorrt: FakeTorchTensorRT, bundle_pt2: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(RuntimeUnavailableError, match=r'pip install "sopdeploy\[torch-tensorrt\]"$'):
        get_engine(bundle_pt2, VIA)
