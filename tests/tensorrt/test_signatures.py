"""Every call of TensorRT and CUDA in our code fits the signature in each release's real bindings.

`signatures.json` was recorded from the Python bindings, which import without a GPU. Calls are found in the
source, so a new call without a recorded signature fails here. ONNX Runtime is not recorded:
tests/tensorrt/test_bound.py runs the real library.
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.tensorrt.surface import SURFACE

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((Path(__file__).parent / "signatures.json").read_text())
TENSORRT = [
    *(ROOT / "sopdeploy" / "tensorrt").glob("*.py"),
    *(ROOT / "export" / "sopdeploy_export" / "engine_builder").glob("*.py"),
    ROOT / "service" / "sopdeploy_service" / "runtime" / "tensorrt.py",
]
NOT_TENSORRT = {"device_memory", "dtype", "infer_shapes", "update"}  # calls of our classes, numpy and onnx
RELEASES = ("10.16", "11.4")


class Used(NamedTuple):
    """A call in the source: name, positional arguments, whether more are unpacked, and keywords."""

    name: str
    positional: int
    unpacked: bool
    keywords: frozenset[str]
    place: str

    def fits(self, signature: str) -> bool:
        """Return whether *signature*, such as `model, path=`, accepts the call."""
        names = [name for name in signature.split(", ") if name]
        given = {name.removesuffix("=") for name in names[: self.positional]} | self.keywords
        required = {name for name in names if not name.endswith("=")}
        known = {name.removesuffix("=") for name in names}
        enough = self.unpacked or required <= given
        return self.positional <= len(names) and self.keywords <= known and enough


def used(node: ast.Call, name: str, path: Path, *, skip: int = 0) -> Used:
    """Describe the call *node* without its first *skip* arguments."""
    plain = [argument for argument in node.args[skip:] if not isinstance(argument, ast.Starred)]
    unpacked = len(plain) < len(node.args) - skip
    keywords = frozenset(keyword.arg for keyword in node.keywords if keyword.arg)
    return Used(name, len(plain), unpacked, keywords, f"{path.name}:{node.lineno}")


def calls() -> Iterator[tuple[ast.Call, Path]]:
    for path in TENSORRT:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield node, path


def tensorrt_calls() -> list[Used]:
    """Find the calls of methods that a TensorRT class has in any release, and of constructors."""
    classes = SURFACE["classes"]
    methods = {name for kind in classes for names in classes[kind].values() for name in (names or "").split()}
    found = []
    for node, path in calls():
        function = node.func
        if isinstance(function, ast.Name) and function.id == "create":  # create(trt, "Builder", logger)
            kind = node.args[1]
            assert isinstance(kind, ast.Constant)
            found.append(used(node, f"{kind.value}.__init__", path, skip=2))
        elif isinstance(function, ast.Attribute):
            constructs = isinstance(function.value, ast.Name) and function.value.id == "trt"
            if constructs and function.attr in classes:
                found.append(used(node, f"{function.attr}.__init__", path))
            elif function.attr in methods - NOT_TENSORRT:
                found.append(used(node, function.attr, path))
    return found


@pytest.mark.parametrize("release", RELEASES)
def test_every_call_of_tensorrt_fits_a_signature_of_the_release(release: str) -> None:
    recorded = RECORDED["tensorrt"][release]
    found = tensorrt_calls()
    assert len(found) > 30
    for call in found:
        end = call.name if "." in call.name else f".{call.name}"
        signatures = [text for name, text in recorded.items() if name.endswith(end)]
        assert signatures, f"{call.place}: {call.name} does not exist in TensorRT {release}"
        if not any(call.fits(one) for text in signatures for one in text.split(" | ")):
            pytest.fail(f"{call.place}: {call.name} takes ({' | '.join(signatures)}) in TensorRT {release}")


def cuda_calls() -> tuple[list[Used], set[str]]:
    """Find the CUDA functions that are called, and all names of CUDA in the source."""
    found, names = [], set()
    for node, path in calls():
        texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        names |= {text for text in texts if text.startswith("cuda") and text[4:5].isupper()}
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if function == "call" and texts and texts[0] in names:
            found.append(used(node, texts[0], path, skip=1))
    return found, names


@pytest.mark.parametrize("release", ["13.5"])
def test_every_call_of_cuda_fits_the_signature_of_the_release(release: str) -> None:
    recorded = RECORDED["cuda"][release]
    found, names = cuda_calls()
    assert len(found) > 10
    assert {name for name in names if name not in recorded["functions"]} <= set(recorded["constants"].split())
    for call in found:
        assert call.fits(recorded["functions"][call.name]), f"{call.place}: {call}"
    assert {"name", "major", "minor", "totalGlobalMem"} <= set(recorded["device"].split())
