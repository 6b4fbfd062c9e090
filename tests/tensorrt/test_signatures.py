"""The simulated TensorRT and CUDA, on which all tests run, have the signatures of the real bindings.

The bindings of CUDA come with torch; those of TensorRT are installed by `make cuda-stand-in`
and read in a process of their own. Both are imported without a GPU.
"""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.stand_in import ABSENT, FOLDER, installed
from tests.support.gpu_graphs import real_tensorrt
from tests.tensorrt.fake_cuda import FakeCuda
from tests.tensorrt.fake_tensorrt import SIMULATED

ROOT = Path(__file__).parents[2]
PARSED_AND_BUILT = (
    "Builder",
    "IBuilderConfig",
    "INetworkDefinition",
    "IOptimizationProfile",
    "OnnxParser",
)
READ_BINDINGS = """
import inspect, json, sys
methods = {}
for kind, members in inspect.getmembers(__import__(sys.argv[1]), inspect.isclass):
    for name, member in inspect.getmembers(members):
        methods[f"{kind}.{name}"] = getattr(member, "__doc__", "") or ""
print(json.dumps(methods))
"""


def methods_of(module: str) -> dict[str, str]:
    """Return the docstring of each `Class.method` of the bindings *module*."""
    bindings = str(FOLDER / "bindings")
    environment = {**os.environ, "PYTHONPATH": bindings, "LD_LIBRARY_PATH": bindings}
    command = [sys.executable, "-c", READ_BINDINGS, module]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    methods: dict[str, str] = json.loads(found.stdout)
    return methods


def signatures(docstring: str) -> set[str]:
    """Return the parameters and the result of each overload, without the names of the modules."""
    lines = re.findall(r"^(?:\d+\. )?\w+(\(self: .*\) -> .*)$", docstring, re.MULTILINE)
    return {re.sub(r"\b\w+_bindings\.\w+\.", "", line) for line in lines}


@pytest.mark.skipif(not installed(), reason=ABSENT)
def test_tensorrt_has_the_methods_of_the_simulated_classes_and_of_the_builder_that_tests_use() -> (
    None
):
    real = methods_of("tensorrt")
    assert "ICudaEngine.device_memory_size_v2" in real
    for kind, simulated in SIMULATED.items():
        for name, method in vars(simulated).items():
            if inspect.isfunction(method) and not name.startswith("_"):
                count = len(inspect.signature(method).parameters)
                known = [
                    (one.count(": "), one.count(" = "))
                    for one in signatures(real[f"{kind}.{name}"])
                ]
                assert any(total - optional <= count <= total for total, optional in known), (
                    f"{kind}.{name}"
                )
    if real_tensorrt() is None:
        return
    sibling, compared = methods_of("tensorrt_rtx"), 0
    source = (ROOT / "commands/sopdeploy_commands/bundles/engine_builder/build.py").read_text(
        encoding="utf-8"
    )
    for name in set(re.findall(r"\.(\w+)\(", source)):
        for kind in PARSED_AND_BUILT:
            compared += len(signatures(sibling.get(f"{kind}.{name}", "")))
            assert signatures(sibling.get(f"{kind}.{name}", "")) <= signatures(
                real.get(f"{kind}.{name}", "")
            ), name
    assert compared >= 10


def test_cuda_has_the_functions_and_constants_of_the_simulated_one() -> None:
    runtime = pytest.importorskip(
        "cuda.bindings.runtime", reason="cuda-bindings is not installed"
    )
    simulated = {
        name: value for name, value in vars(FakeCuda).items() if name.startswith("cuda")
    }
    assert [name for name in simulated if not hasattr(runtime, name)] == []
    for name, function in simulated.items():
        if inspect.isfunction(function):
            real = len(inspect.signature(getattr(runtime, name)).parameters)
            assert len(inspect.signature(function).parameters) == real + 1, name  # self
    assert {"name", "major", "minor", "totalGlobalMem"} <= set(dir(runtime.cudaDeviceProp))
