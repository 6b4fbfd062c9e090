"""onnxruntime on the CPU, or on a GPU with CUDA or TensorRT. The only module that imports onnxruntime."""

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.folder import Bundle
from sopdeploy.environment import import_optional
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy.tensorrt.cache import cache_folder
from sopdeploy_service.runtime.base import translated
from sopdeploy_service.settings import Settings

KEPT = 8  # batch sizes whose tensors stay on the device; the one used longest ago is given up first


@dataclass(frozen=True, slots=True)
class Tensors:
    """The input and the outputs of one batch size on the device, and their binding."""

    images: Any
    outputs: Mapping[str, Any]
    binding: Any


class BoundSession:
    """Runs *session*, of the module *engine*, on tensors of *device*, such as `cuda:0`.

    *image* is the name of the input, *outputs* are the names and the shapes (without the batch) of float32
    outputs.
    """

    def __init__(
        self,
        engine: Any,
        session: Any,
        device: str,
        image: str,
        outputs: Mapping[str, tuple[int | None, ...]],
    ) -> None:
        self._engine, self._session = engine, session
        self._kind, _, number = device.partition(":")
        self._number = int(number or 0)
        self._image, self._shapes = image, outputs
        self._kept: OrderedDict[tuple[int, ...], Tensors] = OrderedDict()

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Return every output by name, (n, ...) float32, for *images* (n, H, W, 3) uint8."""
        tensors = self._tensors(images)
        tensors.images.update_inplace(images)
        self._session.run_with_iobinding(tensors.binding)
        return {name: np.array(value.numpy()) for name, value in tensors.outputs.items()}

    def _tensors(self, images: NDArray[np.uint8]) -> Tensors:
        found = self._kept.pop(images.shape, None) or self._bound(images)
        self._kept[images.shape] = found
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return found

    def _bound(self, images: NDArray[np.uint8]) -> Tensors:
        value, place = self._engine.OrtValue, (self._kind, self._number)
        binding = self._session.io_binding()
        given = value.ortvalue_from_numpy(images, *place)
        binding.bind_ortvalue_input(self._image, given)
        outputs = {
            name: value.ortvalue_from_shape_and_type((len(images), *shape), np.float32, *place)
            for name, shape in self._shapes.items()
        }
        for name, output in outputs.items():
            binding.bind_ortvalue_output(name, output)
        return Tensors(given, outputs, binding)


CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
CUDA_OPTIONS = {"use_tf32": "0"}  # a number that the graph calls fp32 is to be one
DEVICES = {CPU: "cpu", CUDA: "cuda:0", TENSORRT: "cuda:0"}
NAMES = {CPU: "onnxruntime", CUDA: "onnxruntime", TENSORRT: "onnxruntime with tensorrt"}


class OnnxRuntime:
    """A session over `model.onnx` of a bundle."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        provider: str = CPU,
        options: Mapping[str, str] | None = None,
    ) -> None:
        """Load *bundle* for *provider*, told *options*, with *threads* engine threads (None: one a core).

        Raises `RuntimeUnavailableError` where onnxruntime is not installed, cannot run the graph, or would
        run it on another provider.
        """
        engine = import_onnxruntime()
        manifest = bundle.manifest
        self.name = f"{NAMES[provider]} {engine.__version__}"
        self.device = DEVICES[provider]
        self.largest_batch = manifest.batch.maximum
        self._input = manifest.inputs[0].name
        self._outputs = [output.name for output in manifest.outputs]
        chosen = (provider, dict(options or {}))
        self._session = open_session(engine, bundle, threads or available_cores(), chosen)
        self._bound: BoundSession | None = None
        if provider != CPU:
            shapes = {output.name: output.shape[1:] for output in manifest.outputs}
            self._bound = BoundSession(engine, self._session, self.device, self._input, shapes)

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Return every output by name, (n, ...) float32, for *images* (n, H, W, 3) uint8."""
        with translated():
            if self._bound is not None:
                return self._bound.run(images)
            values = self._session.run(self._outputs, {self._input: images})
            return dict(zip(self._outputs, values, strict=True))


def import_onnxruntime() -> Any:
    """Return the onnxruntime module, or raise `RuntimeUnavailableError` saying how to get it."""
    return import_optional("onnxruntime", "onnxruntime", "sopdeploy[cpu]", RuntimeUnavailableError)


def open_session(engine: Any, bundle: Bundle, threads: int, chosen: tuple[str, dict[str, str]]) -> Any:
    """Return a session that runs on the provider *chosen*, there only, and has the manifest's tensors.

    No other provider is given, and the CPU, which onnxruntime adds by itself, may take no operator.
    """
    provider = chosen[0]
    options = engine.SessionOptions()
    options.graph_optimization_level = engine.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only: they reach us as exceptions
    # Spinning threads would take the cores from the decoders.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if provider != CPU:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if provider not in engine.get_available_providers():
        raise RuntimeUnavailableError(
            f"onnxruntime {engine.__version__} has no {provider} here; "
            'run: pip install "sopdeploy[gpu]" in an environment without [cpu]'
        )
    try:
        session = engine.InferenceSession(str(bundle.onnx), options, providers=[chosen])
    except Exception as problem:  # onnxruntime's errors share no base class
        raise RuntimeUnavailableError(why_not_loaded(engine, bundle, provider, problem)) from problem
    if session.get_providers()[0] != provider:
        raise RuntimeUnavailableError(
            f"{bundle.onnx}: asked for {provider}, onnxruntime chose {session.get_providers()}"
        )
    refuse_other_tensors(session, bundle)
    return session


def why_not_loaded(engine: Any, bundle: Bundle, provider: str, problem: Exception) -> str:
    """Return in one line why a session was not made of *bundle*, and what to do."""
    if bundle.manifest.precision == "bf16-backbone":
        return (
            f"{bundle.onnx}: bfloat16, for which onnxruntime {engine.__version__} has no kernels on "
            f"{DEVICES[provider]}; build an engine for a GPU (sopdeploy engine), or export with "
            "--precision fp16 or fp32"
        )
    reason = " ".join(str(problem).split())
    return f"{bundle.onnx}: onnxruntime {engine.__version__} cannot load the graph: {reason}"


def refuse_other_tensors(session: Any, bundle: Bundle) -> None:
    """Refuse a *session* whose inputs and outputs are not the manifest's."""
    manifest = bundle.manifest
    declared = [tensor.name for tensor in (*manifest.inputs, *manifest.outputs)]
    found = [tensor.name for tensor in (*session.get_inputs(), *session.get_outputs())]
    if found != declared:
        raise RuntimeUnavailableError(
            f"{bundle.onnx}: the graph has the tensors {found}, the manifest says {declared}; "
            "export the bundle again"
        )


def has_cuda() -> bool:
    """Say whether the installed onnxruntime was made for CUDA."""
    try:
        return CUDA in import_onnxruntime().get_available_providers()
    except RuntimeUnavailableError:
        return False


def available_cores() -> int:
    """Return how many cores this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)


FOLDER = "onnxruntime-tensorrt"
TYPES = {"fp16": "trt_fp16_enable", "bf16-backbone": "trt_bf16_enable", "int8": "trt_int8_enable"}


def provider_options(bundle: Bundle, settings: Settings) -> dict[str, str]:
    """Return the provider's options for *bundle*: its precision, its batches, a folder of its own.

    The cache's folder is named by the bundle, id included. Raises `RuntimeUnavailableError` where it cannot
    be made.
    """
    folder = made(cache_folder(bundle, settings.engine_cache) / FOLDER)
    batch, name = bundle.manifest.batch, bundle.manifest.inputs[0].name
    sizes = {"min": batch.minimum, "opt": batch.optimum, "max": batch.maximum}
    image = "x".join(map(str, bundle.manifest.image_shape))
    return {
        "device_id": "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        **{option: str(int(kind == bundle.manifest.precision)) for kind, option in TYPES.items()},
        **{f"trt_profile_{which}_shapes": f"{name}:{size}x{image}" for which, size in sizes.items()},
    }


def made(folder: Path) -> Path:
    """Return *folder*, which is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise RuntimeUnavailableError(
            f"{folder}: cannot be made ({problem.strerror}); set SOPDEPLOY_ENGINE_CACHE to another folder"
        ) from problem
    return folder
