"""A `tensorrt` module with the API of each release, which runs graphs in onnxruntime.

`tensorrt_surface.json` lists the names of each release; other names raise `AttributeError`. Known defects
are simulated: 8.6 ignores the axes input of ReduceMean, an untyped network is built in fp32, TF32 is on.
"""

import ctypes
import json
import sys
import weakref
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

SURFACE = json.loads((Path(__file__).parent / "tensorrt_surface.json").read_text())
VERSIONS = tuple(SURFACE["versions"])
SHOWN = {8: {"fp32": "Row major linear FP32", "fp16": "Row major linear FP16 format"}}
SHOWN_LATER = {"fp32": "Float", "fp16": "Half"}
MAGIC = b"fake plan\n"


def members(kind: str, version: str) -> frozenset[str] | None:
    """List the names of *kind* in *version*; None if the class does not exist."""
    entry = SURFACE["classes"][kind]
    if version in entry and entry[version] is None:
        return None
    return frozenset(f"{entry['all']} {entry.get(version, '')}".split())


def limited(kind: str, version: str, base: type) -> type:
    """Restrict *base* to the names of *kind* in *version*."""
    known = members(kind, version)
    assert known is not None

    def checked(access: Any) -> Any:
        def call(self: Any, name: str, *value: Any) -> Any:
            if not name.startswith("_") and name not in known:
                raise AttributeError(f"tensorrt {version}: {kind} has no {name}")
            return access(self, name, *value)

        return call

    special = ("__getattribute__", "__setattr__")
    return type(kind, (base,), {name: checked(getattr(object, name)) for name in special})


FIRST = {"NetworkDefinitionCreationFlag": ["EXPLICIT_BATCH", "STRONGLY_TYPED"]}


def enumeration(kind: str, version: str) -> type:
    names = sorted(members(kind, version) or ())
    ordered = FIRST.get(kind, [])
    values = {name: ordered.index(name) if name in ordered else 10 + i for i, name in enumerate(names)}
    return type(kind, (), {name: type(kind, (int,), {"name": name})(n) for name, n in values.items()})


class Flags:
    """Builder and parser flags."""

    def __init__(self) -> None:
        self._flags: set[int] = set()

    def set_flag(self, flag: int) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: int) -> None:
        self._flags.discard(flag)

    def get_flag(self, flag: int) -> bool:
        return flag in self._flags


class FakeTensorRT(ModuleType):
    """The module; `_faults` names the faults to inject."""

    def __init__(self, version: str) -> None:
        super().__init__("tensorrt")
        self.__version__ = version if version.count(".") == 2 else f"{version}.0"
        self._version = version
        self._major = int(version.split(".")[0])
        self._faults: set[str] = set()
        self._builds = 0
        self._last: dict[str, Any] = {}
        self._contexts: weakref.WeakSet[Any] = weakref.WeakSet()  # those that were not destroyed
        bases = {"Severity", "IProgressMonitor", "ParserError"}
        for kind in SURFACE["classes"].keys() - PARTS.keys() - bases:
            if members(kind, version) is not None:
                setattr(self, kind, enumeration(kind, version))
        self.ILogger = type("ILogger", (), vars(enumeration("Severity", version)).copy())
        if members("IProgressMonitor", version) is not None:
            self.IProgressMonitor = type("IProgressMonitor", (), {})
        for kind, base in PARTS.items():
            made = limited(kind, version, base)
            made._trt = self
            setattr(self, kind, made)

    def _dtype(self, elem: int) -> Any:
        kinds = onnx.TensorProto
        names = {kinds.UINT8: "UINT8", kinds.FLOAT: "FLOAT", kinds.FLOAT16: "HALF"}
        return getattr(self.DataType, names.get(elem, "INT32"))


class Part:
    """Base class; stores the arguments of the constructor in the attributes `_fields`."""

    _trt: Any
    _fields: tuple[str, ...] = ()

    def __init__(self, *values: Any) -> None:
        for name, value in zip(self._fields, values, strict=True):
            setattr(self, name, value)


class Tensor(Part):
    def __init__(self, value: Any) -> None:
        self.name = value.name
        kind = value.type.tensor_type
        self.shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
        self.dtype = self._trt._dtype(kind.elem_type)


class Layer(Part):
    def __init__(self, node: Any, elem: int) -> None:
        kinds = {"Conv": "CONVOLUTION", "MatMul": "MATRIX_MULTIPLY", "Relu": "ACTIVATION", "Cast": "CAST"}
        self.name = node.name
        self.type = getattr(self._trt.LayerType, kinds.get(node.op_type, "SHUFFLE"))
        self._output = type("Output", (), {"dtype": self._trt._dtype(elem)})()

    def get_output(self, index: int) -> Any:
        return self._output

    def set_output_type(self, index: int, kind: Any) -> None:
        assert index == 0
        self._output_type = kind


class Network(Part):
    _model: Any = None
    _layers: Any = ()
    num_inputs = property(lambda self: len(self._model.graph.input))
    num_layers = property(lambda self: len(self._layers))

    def get_input(self, index: int) -> Any:
        return self._trt.ITensor(self._model.graph.input[index])

    def get_layer(self, index: int) -> Any:
        return self._layers[index]


def types_of(model: Any) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


class OnnxParser(Part, Flags):
    """Accepts every graph; tests/tensorrt/test_real_builder.py has what a real parser refuses."""

    def __init__(self, network: Any, logger: Any) -> None:
        Flags.__init__(self)
        self._network = network

    def parse(self, graph: bytes) -> bool:
        model = onnx.ModelProto.FromString(graph)
        if self._trt._major < 10:
            for node in model.graph.node:  # the parser of 8.6 ignores the axes input, except of ReduceSum
                if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum":
                    del node.input[1:]
        types = types_of(model)
        self._network._model = model
        self._network._layers = [self._trt.ILayer(n, types.get(n.output[0], 0)) for n in model.graph.node]
        return True


class OptimizationProfile(Part):
    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def set_shape(self, name: str, low: Any, best: Any, high: Any) -> None:
        self._shapes[name] = (low, best, high)


class Memory(Part):
    _fields = ("_content",)

    def __bytes__(self) -> bytes:
        return self._content


class TimingCache(Part):
    _fields = ("_content",)

    def serialize(self) -> Any:
        return self._trt.IHostMemory(self._content + b"t")


class BuilderConfig(Part, Flags):
    def __init__(self) -> None:
        Flags.__init__(self)
        self.set_flag(self._trt.BuilderFlag.TF32)
        self._profiles: list[Any] = []
        self._pools: dict[Any, int] = {}
        self._timings: Any = None

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self._pools[pool] = size

    def add_optimization_profile(self, profile: Any) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, content: bytes) -> Any:
        return None if content == b"damaged" else self._trt.ITimingCache(content)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        if cache._content == b"of another machine":
            return False
        self._timings = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._timings


def started(trt: Any, logger: Any) -> Any:
    """Keep *logger*; as pybind11 does, raise `TypeError` if TensorRT cannot start."""
    if "cannot start" in trt._faults:
        logger.log(trt.ILogger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")
    return logger


class Builder(Part):
    def __init__(self, logger: Any) -> None:
        self._logger = started(self._trt, logger)

    def create_network(self, flags: int) -> Any:
        network = self._trt.INetworkDefinition()
        kinds = self._trt.NetworkDefinitionCreationFlag
        if self._trt._major < 10:
            assert flags & (1 << kinds.EXPLICIT_BATCH), "8.6 needs an explicit batch"
        network._typed = self._trt._major > 10 or bool(flags & (1 << getattr(kinds, "STRONGLY_TYPED", 30)))
        return network

    def create_builder_config(self) -> Any:
        return self._trt.IBuilderConfig()

    def create_optimization_profile(self) -> Any:
        return self._trt.IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        trt = self._trt
        trt._builds += 1
        trt._last = {"network": network, "config": config}
        if "refuse" in trt._faults:
            self._logger.log(trt.ILogger.ERROR, "Could not find any implementation for node x")
            return None
        if monitor := getattr(config, "_monitor", None) or config.__dict__.get("progress_monitor"):
            monitor.phase_start("Building Engine", None, 2)
            for step in range(2):
                if not monitor.step_complete("Building Engine", step):
                    return None
            monitor.phase_finish("Building Engine")
        shapes = [p._shapes[network._model.graph.input[0].name] for p in config._profiles]
        head = json.dumps({"profiles": shapes, "layers": layers(trt, network, config)})
        lines = (trt._version.encode(), head.encode(), network._model.SerializeToString())
        return trt.IHostMemory(MAGIC + b"\n".join(lines))


def layers(trt: Any, network: Any, config: Any) -> list[dict[str, Any]]:
    """The inspector's layers: fp16 only if the network is typed or 8.6 has layer precisions."""
    types = types_of(network._model)
    words = SHOWN.get(trt._major, SHOWN_LATER)
    half = config.get_flag(getattr(trt.BuilderFlag, "FP16", -1)) if trt._major < 10 else network._typed
    if "silent fp32" in trt._faults:
        half = False

    def shown(name: str) -> dict[str, Any]:
        low = types.get(name) == onnx.TensorProto.FLOAT16 and half
        floating = types.get(name) in {onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT}
        word = words["fp16" if low else "fp32"] if floating else "Int32"
        if "half everywhere" in trt._faults and floating:
            word = words["fp16"]
        return {"Name": name, "Dimensions": [1], "Format/Datatype": word}

    tactic = "sm80_tf32f32_gemm" if config.get_flag(trt.BuilderFlag.TF32) else "sm80_f32_gemm"
    return [
        {
            "Name": node.name,
            "LayerType": "Cask",
            "Inputs": [shown(name) for name in node.input],
            "Outputs": [shown(name) for name in node.output],
            "TacticName": tactic,
            "Metadata": f"[ONNX Layer: {node.name}]",
        }
        for node in network._model.graph.node
    ]


class Inspector(Part):
    _fields = ("_facts",)

    def get_engine_information(self, form: Any) -> str:
        found = self._facts["layers"]
        if "names only" in self._trt._faults:
            found = [layer["Name"] for layer in found]
        return json.dumps({"Layers": found, "Bindings": []})


class Engine(Part):
    def __init__(self, facts: Any, graph: bytes) -> None:
        self._facts = facts
        self._model = onnx.ModelProto.FromString(graph)
        self._border = {v.name: v for v in (*self._model.graph.input, *self._model.graph.output)}
        self._session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])

    num_io_tensors = property(lambda self: len(self._border))
    num_optimization_profiles = property(lambda self: len(self._facts["profiles"]))

    def get_tensor_name(self, index: int) -> str:
        return list(self._border)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return self._trt.ITensor(self._border[name]).dtype

    def get_tensor_shape(self, name: str) -> Any:
        return self._trt.ITensor(self._border[name]).shape

    def get_tensor_profile_shape(self, name: str, index: int) -> Any:
        return [tuple(shape) for shape in self._facts["profiles"][index]]

    device_memory_size_v2 = property(
        lambda self: 256 * max(high[0] for _, _, high in self._facts["profiles"])
    )

    def create_execution_context(self, strategy: Any = None) -> Any:
        strategies = getattr(self._trt, "ExecutionContextAllocationStrategy", None)
        context = self._trt.IExecutionContext(self)
        context._needs_memory = strategies is not None and strategy == strategies.USER_MANAGED
        return context

    def create_engine_inspector(self) -> Any:
        return self._trt.EngineInspector(self._facts)


class Context(Part):
    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._addresses: dict[str, int] = {}
        self._profile = 0
        self._shape: Any = None
        self._needs_memory = False
        self._trt._contexts.add(self)

    def set_device_memory(self, memory: int, size: int) -> None:
        self._needs_memory = size < self._engine.device_memory_size_v2
        self._memory = memory

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if "no profile" in self._trt._faults:
            raise RuntimeError("Error in set optimization profile async.")
        self._profile = index
        return True

    def _check_not_capturing(self) -> None:
        assert sys.modules["cuda.bindings.runtime"].recording is None, "a capture must contain kernels only"  # type: ignore[attr-defined]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._check_not_capturing()
        self._addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        self._check_not_capturing()
        low, _, high = self._engine._facts["profiles"][self._profile]
        self._shape = tuple(shape)
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def execute_async_v3(self, stream: int) -> bool:
        if "fails" in self._trt._faults or self._needs_memory:
            return False
        work = partial(self._compute, self._shape, dict(self._addresses))
        sys.modules["cuda.bindings.runtime"].put(work, stream)  # type: ignore[attr-defined]
        return True

    def _compute(self, shape: tuple[int, ...], addresses: dict[str, int]) -> None:
        session = self._engine._session
        size = int(np.prod(shape))
        source = session.get_inputs()[0].name
        raw = (ctypes.c_char * size).from_address(addresses[source])
        images = np.frombuffer(raw, dtype=np.uint8).reshape(shape).copy()
        for output, values in zip(session.get_outputs(), session.run(None, {source: images}), strict=True):
            content = np.ascontiguousarray(values).tobytes()
            ctypes.memmove(addresses[output.name], content, len(content))


class Runtime(Part):
    def __init__(self, logger: Any) -> None:
        self._logger = started(self._trt, logger)

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        magic, version, head, graph = [*bytes(plan).split(b"\n", 3), b"", b"", b""][:4]
        if magic + b"\n" != MAGIC or version.decode() != self._trt._version:
            self._logger.log(self._trt.ILogger.ERROR, "magicTag in the plan is not expected")
            return None
        return self._trt.ICudaEngine(json.loads(head), graph)


PARTS = {
    "Builder": Builder,
    "IBuilderConfig": BuilderConfig,
    "INetworkDefinition": Network,
    "ITensor": Tensor,
    "ILayer": Layer,
    "OnnxParser": OnnxParser,
    "IOptimizationProfile": OptimizationProfile,
    "ITimingCache": TimingCache,
    "IHostMemory": Memory,
    "Runtime": Runtime,
    "ICudaEngine": Engine,
    "IExecutionContext": Context,
    "EngineInspector": Inspector,
}
