"""onnxruntime on the CPU, or on a GPU with CUDA or TensorRT. The only module that imports onnxruntime."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle import Bundle
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy.extras import imported
from sopdeploy_service.runtime.bound import BoundSession
from sopdeploy_service.runtime.failures import translated

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
    return imported("onnxruntime", "onnxruntime", "sopdeploy[cpu]", RuntimeUnavailableError)


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
