"""What the code calls of TensorRT and CUDA exists in their real bindings, with as many parameters.

The bindings of CUDA come with torch; those of TensorRT are installed by `make cuda-stand-in`
and read in a process of their own. Both are imported without a GPU.
"""

import ast
import inspect
import json
import os
import re
import subprocess
import sys

import pytest

from sopdeploy_commands.engine_builder import build
from sopdeploy_service.runtime import tensorrt_session
from tests.cuda.stand_in import FOLDER, require
from tests.support.gpu_graphs import real_tensorrt

RUN = ("Runtime", "ICudaEngine", "IExecutionContext")
BUILT = (
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
    """Return the docstring of each `Class.method` of the bindings *module*; skip without them."""
    require()
    bindings = str(FOLDER / "bindings")
    environment = {**os.environ, "PYTHONPATH": bindings, "LD_LIBRARY_PATH": bindings}
    command = [sys.executable, "-c", READ_BINDINGS, module]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    methods: dict[str, str] = json.loads(done.stdout)
    return methods


def signatures(docstring: str) -> set[str]:
    """Return the parameters and the result of each overload, without the names of the modules."""
    lines = re.findall(r"^(?:\d+\. )?\w+(\(self: .*\) -> .*)$", docstring, re.MULTILINE)
    return {re.sub(r"\b\w+_bindings\.\w+\.", "", line) for line in lines}


def calls_of(module: object) -> list[tuple[str, list[ast.expr]]]:
    """Return the name and the arguments of each call of a method in the source of *module*."""
    tree = ast.parse(inspect.getsource(module))  # type: ignore[arg-type]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        (
            call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func),
            call.args,
        )
        for call in calls
    ]


def test_tensorrt_has_the_methods_that_run_an_engine() -> None:
    real = methods_of("tensorrt")
    assert "ICudaEngine.device_memory_size_v2" in real
    compared = set()

    for name, arguments in calls_of(tensorrt_session):
        for kind in RUN:
            overloads = signatures(real.get(f"{kind}.{name}", ""))
            if overloads:
                compared.add(name)
                counts = [
                    range(one.count(": ") - one.count(" = "), one.count(": ") + 1)
                    for one in overloads
                ]
                assert any(1 + len(arguments) in count for count in counts), f"{kind}.{name}"

    assert compared == {
        "create_execution_context",
        "deserialize_cuda_engine",
        "execute_async_v3",
        "set_device_memory",
        "set_input_shape",
        "set_optimization_profile_async",
        "set_tensor_address",
    }


def test_tensorrt_builds_with_the_methods_of_the_builder_that_tests_use() -> None:
    if real_tensorrt() is None:
        pytest.skip("tensorrt-rtx-cu13 is not installed")
    real = methods_of("tensorrt")
    sibling = methods_of("tensorrt_rtx")
    compared = 0

    for name in {name for name, _ in calls_of(build)}:
        for kind in BUILT:
            overloads = signatures(sibling.get(f"{kind}.{name}", ""))
            assert overloads <= signatures(real.get(f"{kind}.{name}", "")), f"{kind}.{name}"
            compared += len(overloads)
    assert compared >= 10


def test_cuda_has_the_functions_that_the_code_calls() -> None:
    runtime = pytest.importorskip(
        "cuda.bindings.runtime", reason="cuda-bindings is not installed"
    )
    source = inspect.getsource(tensorrt_session)
    names = set(re.findall(r"\bcuda[A-Z]\w+", source))
    kinds = {"cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"}

    assert kinds | {"cudaMemcpyAsync", "cudaEventRecord", "cudaStreamWaitEvent"} <= names
    assert [name for name in names - kinds if not hasattr(runtime, name)] == []
    assert kinds <= set(dir(runtime.cudaMemcpyKind))
    assert {"name", "major", "minor", "totalGlobalMem"} <= set(dir(runtime.cudaDeviceProp))

    for name, arguments in calls_of(tensorrt_session):
        match [name, *arguments]:
            case ["call", ast.Constant(value=str(function)), *others] if not any(
                isinstance(one, ast.Starred) for one in others
            ):
                real = inspect.signature(getattr(runtime, function)).parameters
                assert len(others) == len(real), function
