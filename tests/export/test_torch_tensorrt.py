"""`sopdeploy engine --via torch-tensorrt`: real converters and a real build; loading a plan needs a GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.errors import EngineError, RuntimeUnavailableError
from sopdeploy.models.base import Classifier
from sopdeploy.tensorrt.cache import Profile
from sopdeploy_export.engine_builder.from_program import build_from_program
from sopdeploy_export.results import Exported
from tests.export.conftest import export_once
from tests.service.children import PYTHONPATH

FOLDER = Path(sys.prefix) / "cuda" / "torch-tensorrt"
PROFILE = Profile(minimum=1, maximum=4)
needs_converters = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="torch-tensorrt is not installed (`make cuda-stand-in`)"
)


def converted(bundle: Path) -> dict[str, object]:
    """Build the program of *bundle* in a process of its own."""
    paths = f"{PYTHONPATH}{os.pathsep}{FOLDER}"
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(Path(__file__).with_name("convert_program.py")), str(bundle)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answer


@needs_converters
def test_torch_tensorrt_converts_every_operator_and_keeps_the_names_of_tensors(branched: Exported) -> None:
    answer = converted(branched.path)
    assert answer["tensors"] == ["images", "logits"]
    assert int(str(answer["bytes"])) > 100_000


@needs_converters
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config", "outputs"),
    [
        ("resnet8", {"pooling": "isqrt"}, ["logits"]),
        ("gsop-net2-preact-resnet164", {"blocks": 3}, ["logits"]),
        ("gmsop-16-8-resnet18", {}, ["logits", "gates"]),
    ],
)
def test_torch_tensorrt_converts_every_family(
    name: str, config: dict[str, Any], outputs: list[str], make: Callable[..., Classifier], tmp_path: Path
) -> None:
    bundle = export_once(make(name, **config), name, tmp_path, max_batch=4, pt2=True).path
    assert converted(bundle)["tensors"] == ["images", *outputs]


def test_what_is_missing_is_one_line(
    branched: Exported, gated: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineError, match=r"has no network\.pt2; export the checkpoint again with --pt2"):
        build_from_program(open_bundle(gated.path), PROFILE, 1 << 30)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(RuntimeUnavailableError, match=r"sopdeploy\[torch-tensorrt\]"):
        build_from_program(open_bundle(branched.path), PROFILE, 1 << 30)


def test_an_operator_without_a_converter_is_named(
    branched: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(*_: object, **__: object) -> bytes:
        try:
            raise RuntimeError(
                "Conversion of function torch._ops.aten.aten::roll not currently supported!\n\nx"
            )
        except RuntimeError as error:
            raise RuntimeError("Conversion of module GraphModule(\n  (conv1): Module()\n)") from error

    dynamo = SimpleNamespace(convert_exported_program_to_serialized_trt_engine=convert)
    library = SimpleNamespace(Input=lambda **_: None, dynamo=dynamo)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", library)
    with pytest.raises(EngineError, match=r"cannot build the engine: RuntimeError: .*aten::roll not .*!$"):
        build_from_program(open_bundle(branched.path), PROFILE, 1 << 30)
