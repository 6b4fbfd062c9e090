"""Runs of a network and of a file: in float64, in batches, in ONNX Runtime; and the gate of a mixture."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import BuiltinFunctionType
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from sopdeploy.base.environment import EXACT_INT8, lacks_vnni
from sopdeploy.base.files import GRAPH_DATA
from sopdeploy.bundle.manifest import GATES
from sopdeploy.bundle.onnx_root import NO_WEIGHTS
from sopdeploy.errors import ParityError
from sopdeploy.layers.export_hints import export_hints
from sopdeploy_export.capture.deployed import INPUT, Deployed

PROVIDER = "CPUExecutionProvider"
SINGLE_PROBES = 2  # that run alone
# Of the batches of a file. An odd size, because some graphs work for even ones only.
LARGEST_BATCH = 5
# For larger batches, the C library takes memory from the system for each operator and gives it
# back, which is slow.
PROBE_BATCH = 4

Arrays = dict[str, NDArray[Any]]
BatchRun = Callable[[Tensor], tuple[Tensor, ...]]
GateRun = Callable[[Tensor], NDArray[Any]]
GET_DTYPE = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]
FLOAT32_EPS = float(np.finfo(np.float32).eps)
# Rounding errors of float32, relative to the range of a logit over the images, that sums in another order
# explain.
MOST_ROUNDINGS = 4096
# Sizes of the batches in a plain run, together the number of the images of an export; larger ones than the
# largest batch are left out. Two images run alone: one has bars, the other one has extreme pixels. The first
# of these runs again at the end.
SIZES = (2, 1, 1, 3, 6)
REPEATED = 1  # the number of this batch
REDUCED = (torch.float16, torch.bfloat16, torch.float32)


class InFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Compute in float64 also where the code of a network names another type, as `.float()` does.

    Weights and constants are converted where an operation reads them, so that no second copy of
    all weights is in memory. `ReportsFloat32` beside it lets the code of the network read float32
    as the `dtype` of float64, so that it takes the same path.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run *func* in float64 where the code of a network names a smaller type.

        A `dtype` argument becomes float64, and so do the operands and the result, but for an
        operand that *func* writes to.
        """
        del types

        # Types that the code names.
        args = tuple(map(widen_dtype, args))
        kwargs = {name: widen_dtype(value) for name, value in (kwargs or {}).items()}

        # Operands. The mode `ReportsFloat32` must not change what `dtype` gives here. An operation
        # that writes to an operand needs this operand itself, not a converted copy.
        with torch._C.DisableTorchFunction():
            is_written = {
                argument.name: bool(argument.alias_info and argument.alias_info.is_write)
                for argument in func._schema.arguments
            }
            args = [
                value if written else tree_map_only(Tensor, _widen, value)
                for value, written in zip(args, is_written.values(), strict=False)
            ]
            kwargs = {
                name: value if is_written[name] else tree_map_only(Tensor, _widen, value)
                for name, value in kwargs.items()
            }
            # In another layout, such as channels last, a convolution takes several times longer.
            if func is torch.ops.aten.convolution.default:
                args[0] = args[0].contiguous()
            result = func(*args, **kwargs)
            return result if func._schema.is_mutable else tree_map_only(Tensor, _widen, result)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.dtype in REDUCED else tensor


class ReportsFloat32(TorchFunctionMode):
    """Returns float32 as the `dtype` of tensors in float64, and passes weights in float64 to functions.

    Some functions, such as convolutions, compare the types of their operands before `InFloat64` sees
    them.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if isinstance(function, BuiltinFunctionType):  # not a method, such as `data_ptr`
            args, kwargs = tree_map_only(nn.Parameter, _widen, (args, kwargs))
        result = function(*args, **kwargs)
        return torch.float32 if result is torch.float64 and function == GET_DTYPE else result


def widen_dtype(value: Any) -> Any:
    """Replace *value*, an argument of an operation, by `torch.float64` if it is a smaller `torch.dtype`."""
    return torch.float64 if isinstance(value, torch.dtype) and value in REDUCED else value


class PlainOutputs(NamedTuple):
    """A plain run: P uint8 images (H, W, 3) by name, and the outputs (P, ...) for them.

    The batch `REPEATED` ran again at the end; *repeated* are its second outputs.
    """

    images: Mapping[str, NDArray[np.uint8]]
    outputs: tuple[Tensor, ...]
    repeated: tuple[Tensor, ...]


def divide(images: Tensor, largest: int) -> list[Tensor]:
    """Divide *images* (P, ...) into batches of at most *largest*: of `SIZES`, then of the largest size.

    Repeated images fill the last batch.
    """
    sizes: list[int] = []
    preferred = iter(size for size in SIZES if size <= largest)
    while sum(sizes) < len(images):
        sizes.append(next(preferred, min(largest, SIZES[-1])))

    filled = torch.cat([images, images[: sum(sizes) - len(images)]])
    return list(torch.split(filled, sizes))


def run_as_users_do(
    run: BatchRun, images: Mapping[str, NDArray[np.uint8]], largest: int
) -> PlainOutputs:
    """Run uint8 *images* (H, W, 3), by name, in batches of at most *largest*, with torch's fast path."""
    batches = divide(torch.from_numpy(np.stack([*images.values()])), largest)
    runs = [run_batch(run, batch) for batch in batches]
    repeated = run_batch(run, batches[REPEATED])
    outputs = [torch.cat(parts)[: len(images)] for parts in zip(*runs, strict=True)]
    return PlainOutputs(images, tuple(outputs), repeated)


@torch.no_grad()
def run_batch(run: BatchRun, images: Tensor) -> tuple[Tensor, ...]:
    """Return copies of the outputs of *run* for a copy of *images*, without gradients and warnings."""
    with warnings.catch_warnings(action="ignore"):
        return tuple(output.clone() for output in run(images.clone()))


@torch.no_grad()
def run_probes(run: BatchRun, probes: Tensor) -> tuple[Tensor, ...]:
    """Run uint8 *probes* (P, H, W, 3) in batches of `PROBE_BATCH`, the last `SINGLE_PROBES` alone.

    *run* computes the outputs of one batch. Returns one tensor (P, ...) for each output.
    """
    batches = [
        *torch.split(probes[:-SINGLE_PROBES], PROBE_BATCH),
        *torch.split(probes[-SINGLE_PROBES:], 1),
    ]
    with without_fast_path():
        outputs = [run(batch) for batch in batches if len(batch)]
    return tuple(map(torch.cat, zip(*outputs, strict=True)))


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Switch off the fast path of `nn.MultiheadAttention` in the block, which no graph and no float64 run takes."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


def open_session(
    model: Path | onnx.ModelProto, weights: memoryview = NO_WEIGHTS, *, optimized: bool = True
) -> ort.InferenceSession:
    """Load *model* on the CPU; without *optimized*, its operators are not fused.

    *weights* are those of a graph in memory, if they are in a file of their own.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    # Idle threads sleep.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if lacks_vnni():
        options.add_session_config_entry(*EXACT_INT8)
    if weights:
        options.add_external_initializers_from_files_in_memory(
            [GRAPH_DATA], [weights], [len(weights)]
        )
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(source, options, providers=[PROVIDER])


def file_outputs(
    session: ort.InferenceSession, images: NDArray[np.uint8], batch: int
) -> Arrays:
    """Run *images* (P, H, W, 3) in batches of exactly *batch*; repeated images fill the last batch.

    Returns the outputs (P, ...) by name. Raises `ParityError` if the file does not accept this
    batch size.
    """
    names = [output.name for output in session.get_outputs()]

    chunks = []
    for start in range(0, len(images), batch):
        indices = np.arange(start, start + batch) % len(images)
        try:
            outputs = session.run(names, {INPUT: images[indices]})
        except Exception as problem:  # onnxruntime's errors share no base class
            reason = str(problem).strip().partition("\n")[0][:200]
            raise ParityError(
                f"the exported file rejects a batch of {batch}: {reason}"
            ) from problem
        chunks.append(dict(zip(names, outputs, strict=True)))

    # Leave out the outputs for repeated images.
    return {
        name: np.concatenate([chunk[name] for chunk in chunks])[: len(images)] for name in names
    }


def find_gate(network: nn.Module) -> Any:
    """Find the gate of *network*, the layer of a mixture of poolings that declares `is_gate`.

    Returns None unless there is exactly one and its weights are an output of *network*.
    """
    gates = [part for part in network.modules() if export_hints(part).is_gate]
    return gates[0] if len(gates) == 1 and GATES in getattr(network, "outputs", ()) else None


def gate_logits(deployed: Deployed, pixels: Tensor) -> NDArray[Any]:
    """Compute the logits (P, N) of the gate for uint8 *pixels* (P, H, W, 3).

    *deployed* must have a gate (`find_gate`). The dtype is that in which it computes the logits.
    """
    gate = find_gate(deployed.network)
    # The gate returns weights. A hook computes its logits of what they are made of, too.
    computed: list[Tensor] = []
    hook = gate.feature.register_forward_hook(
        lambda _, _args, feature: computed.append(gate.logits(feature))
    )
    with hook, torch.no_grad():
        deployed(pixels)
    return computed[0].numpy()


def mark_decided(logits: NDArray[Any], num_chosen: int, tolerance: float) -> NDArray[np.bool_]:
    """Mark the images (P,) for which the same components stay chosen if each logit drifts by *tolerance*.

    The gate chooses the *num_chosen* components with the largest *logits* (P, N).
    """
    ranked = -np.sort(-logits, axis=1)  # (P, N), the largest first

    # The distance from the smallest chosen logit to each one that is not chosen. Both may drift,
    # towards each other.
    smallest_chosen = ranked[:, num_chosen - 1 : num_chosen]  # (P, 1)
    margins = smallest_chosen - ranked[:, num_chosen:]  # (P, N - num_chosen)
    return np.asarray((margins > 2 * tolerance).all(axis=1), dtype=np.bool_)


def run_in_batches(
    run: BatchRun, names: Sequence[str], images: NDArray[np.uint8], batch: int
) -> Arrays:
    """Run *images* (P, H, W, 3) in batches of at most *batch*; return the outputs (P, ...) by name.

    *names* are those of what *run* returns, in its order.
    """
    pixels = torch.from_numpy(images)
    with torch.no_grad():
        chunks = [run(pixels[i : i + batch]) for i in range(0, len(pixels), batch)]
    by_name = [dict(zip(names, outputs, strict=True)) for outputs in chunks]
    return {name: torch.cat([outputs[name] for outputs in by_name]).numpy() for name in names}
