"""TensorRT: the real parser and builder of TensorRT-RTX, and a simulated GPU.

A plan is the real one with the parsed graph behind it; the simulated engine runs that graph in
onnxruntime. test_signatures.py compares the simulated classes with the real bindings.
"""

import ctypes
import json
import sys
import weakref
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort

from tests.support.gpu_graphs import RealTensorRT

END = b"\nend of the real plan\n"


class FakeTensorRT(RealTensorRT):
    """The module; `_faults` names the faults to inject."""

    def __init__(self, version: str) -> None:
        super().__init__()
        self.__version__ = version if version.count(".") == 2 else f"{version}.0"
        self._version = version
        self._faults: set[str] = set()
        self._builds = 0
        self._config: Any = None  # of the last build
        self._graph = b""  # that was parsed last
        self._contexts: weakref.WeakSet[Any] = (
            weakref.WeakSet()
        )  # those that were not destroyed
        self.OnnxParser, self.Builder = parser(self), builder(self)
        for kind, base in SIMULATED.items():
            setattr(self, kind, type(kind, (base,), {"_trt": self}))

    def _start(self, logger: Any) -> None:
        """As pybind11 does, raise `TypeError` if TensorRT cannot start."""
        if "cannot start" in self._faults:
            logger.log(self.ILogger.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")


def parser(trt: FakeTensorRT) -> type:
    """The real parser; the simulated engine runs what it parsed."""

    class OnnxParser(trt.OnnxParser):  # type: ignore[misc, name-defined]
        def parse(self, graph: bytes) -> bool:
            trt._graph = graph
            return bool(super().parse(graph))

        __del__ = trt.Builder.__del__

    return OnnxParser


def builder(trt: FakeTensorRT) -> type:
    """The real builder; its plan contains the graph that was parsed."""

    class Builder(trt.Builder):  # type: ignore[misc, name-defined]
        def __init__(self, logger: Any) -> None:
            trt._start(logger)
            super().__init__(logger)
            self._logger, self._profiles = logger, []

        def create_optimization_profile(self) -> Any:
            self._profiles.append(super().create_optimization_profile())
            return self._profiles[-1]

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            trt._builds, trt._config = trt._builds + 1, config
            if "refuse" in trt._faults:
                self._logger.log(
                    trt.ILogger.ERROR, "Could not find any implementation for node x"
                )
                return None
            plan = super().build_serialized_network(network, config)
            source = network.get_input(0).name
            shapes = [
                [tuple(shape) for shape in one.get_shape(source)] for one in self._profiles
            ]
            head = json.dumps({"version": trt._version, "profiles": shapes}).encode()
            return None if plan is None else END.join((bytes(plan), head, trt._graph))

    return Builder


class Runtime:
    _trt: FakeTensorRT

    def __init__(self, logger: Any) -> None:
        self._trt._start(logger)
        self._logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        _, head, graph = [*bytes(plan).split(END), b"{}", b""][:3]
        if json.loads(head).get("version") != self._trt._version:
            self._logger.log(self._trt.ILogger.ERROR, "magicTag in the plan is not expected")
            return None
        return self._trt.ICudaEngine(json.loads(head)["profiles"], graph)


class Engine:
    _trt: FakeTensorRT

    def __init__(self, profiles: Any, graph: bytes) -> None:
        self._profiles = profiles
        self._session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])

    @property
    def device_memory_size_v2(self) -> int:
        return 256 * max(high[0] for _, _, high in self._profiles)

    def create_execution_context(self, strategy: Any = None) -> Any:
        return self._trt.IExecutionContext(self, strategy is not None)


class Context:
    _trt: FakeTensorRT

    def __init__(self, engine: Engine, needs_memory: bool) -> None:
        self._engine, self._needs_memory = engine, needs_memory
        self._addresses: dict[str, int] = {}
        self._trt._contexts.add(self)

    def set_device_memory(self, memory: int, size: int) -> None:
        self._needs_memory = size < self._engine.device_memory_size_v2
        self._memory = memory

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if "no profile" in self._trt._faults:
            raise RuntimeError("Error in set optimization profile async.")
        self._profile = index
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        low, _, high = self._engine._profiles[self._profile]
        self._shape = tuple(shape)
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def execute_async_v3(self, stream: int) -> bool:
        if "fails" in self._trt._faults or self._needs_memory:
            return False
        cuda().put(partial(self._compute, self._shape, dict(self._addresses)), stream)
        return True

    def _compute(self, shape: tuple[int, ...], addresses: dict[str, int]) -> None:
        session = self._engine._session
        source = session.get_inputs()[0].name
        raw = (ctypes.c_char * int(np.prod(shape))).from_address(addresses[source])
        images = np.frombuffer(raw, dtype=np.uint8).reshape(shape).copy()
        for output, values in zip(
            session.get_outputs(), session.run(None, {source: images}), strict=True
        ):
            content = np.ascontiguousarray(values).tobytes()
            ctypes.memmove(addresses[output.name], content, len(content))


def cuda() -> Any:
    return sys.modules["cuda.bindings.runtime"]


SIMULATED = {
    "Runtime": Runtime, "ICudaEngine": Engine, "IExecutionContext": Context,
}  # fmt: skip
