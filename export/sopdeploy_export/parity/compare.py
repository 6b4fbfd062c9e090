"""Compare the exported ONNX file, loaded from disk, with the network it was exported from.

The file runs in ONNX Runtime, with the graph optimizations used for serving. The reference is the network in
float64. The noise floor is the error of the network's own run in the exported precision. Every output must
stay within its tolerance at every tested batch size, and must not depend on the other images of the batch. A
changed top class is an error unless the network's margin is so small that rounding can change it.

The gate of a mixture that is nearly undecided may choose other components after rounding, and every later
number then changes although nothing is wrong. Images for which the margin between its K-th and next logit is
within the measured noise of these logits are left out. If that is every image, those are compared for which
the network's own run in the exported precision chooses the same components as in float64.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sopdeploy.bundle.manifest import GATES, BatchRange, Precision
from sopdeploy.environment import EXACT_INT8, lacks_vnni
from sopdeploy.errors import ParityError
from sopdeploy.layers.export_hints import export_hints
from sopdeploy_export import results
from sopdeploy_export.graph.capture import INPUT, Deployed, output_names
from sopdeploy_export.network import copy_module

Arrays = dict[str, NDArray[Any]]
BatchRun = Callable[[Tensor], tuple[Tensor, ...]]
GateRun = Callable[[Tensor], NDArray[Any]]
SINGLE_IMAGES, BATCH = 4, 16
LARGEST_BATCH = 13  # an odd size above the 12 generated probes; larger ones take more time and memory
BATCH_IN_FLOAT64 = 4  # attention in float64 takes 0.1 GB per image of 518 pixels
UNDECIDED = "train longer"
FOUR_ROUNDINGS = 4 * float(np.finfo(np.float32).eps)  # four float32 rounding errors, relative to the value
GET_DTYPE = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]
REDUCED = (torch.float16, torch.bfloat16, torch.float32)


class InFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Compute in float64 also where the code of a network names another type, as `.float()` does.

    Constants that `.double()` does not reach, such as tensors made in `forward`, are converted where an
    operation combines them with float64. The code of a network reads float32 as the `dtype` of float64, so
    that it takes the same path.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run *func* in float64 where the code of a network names a smaller type.

        A `dtype` argument becomes float64, and so do the operands if one of them is, unless *func* writes to
        an operand.
        """
        del types
        args = tuple(map(widen_dtype, args))
        kwargs = {name: widen_dtype(value) for name, value in (kwargs or {}).items()}
        with torch._C.DisableTorchFunction():  # so that `ReportsFloat32` does not change `value.dtype` here
            dtypes = {value.dtype for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
            # An operation that writes to an operand needs this operand itself, not a converted copy.
            if torch.float64 in dtypes and dtypes & set(REDUCED) and not func._schema.is_mutable:
                args, kwargs = tree_map_only(
                    Tensor, lambda t: t.double() if t.dtype in REDUCED else t, (args, kwargs)
                )
            return func(*args, **kwargs)


class ReportsFloat32(TorchFunctionMode):
    """Returns float32 as the `dtype` of tensors in float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = function(*args, **(kwargs or {}))
        return torch.float32 if result is torch.float64 and function == GET_DTYPE else result


def widen_dtype(value: Any) -> Any:
    """Replace *value*, an argument of an operation, by `torch.float64` if it is a smaller `torch.dtype`."""
    return torch.float64 if isinstance(value, torch.dtype) and value in REDUCED else value


def open_session(model: Path | onnx.ModelProto, *, optimized: bool = True) -> ort.InferenceSession:
    """Load *model* on the CPU; without *optimized*, its operators are not fused."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if lacks_vnni():
        options.add_session_config_entry(*EXACT_INT8)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(source, options, providers=[results.PROVIDER])


def file_outputs(session: ort.InferenceSession, images: NDArray[np.uint8], batch: int) -> Arrays:
    """Run *images* in batches of exactly *batch* images; repeated images fill the last batch.

    Raises `ParityError` if the file does not accept this batch size.
    """
    names = [output.name for output in session.get_outputs()]
    chunks = []
    for start in range(0, len(images), batch):
        indices = np.arange(start, start + batch) % len(images)
        try:
            outputs = session.run(names, {INPUT: images[indices]})
        except Exception as problem:  # onnxruntime's errors share no base class
            reason = str(problem).strip().partition("\n")[0][:200]
            raise ParityError(f"the exported file rejects a batch of {batch}: {reason}") from problem
        chunks.append(dict(zip(names, outputs, strict=True)))
    return {name: np.concatenate([chunk[name] for chunk in chunks])[: len(images)] for name in names}


def find_gate(network: nn.Module) -> Any:
    """Find the gate of *network*, a layer that declares `is_gate`.

    Returns None unless there is exactly one and its weights are an output of *network*.
    """
    gates = [part for part in network.modules() if export_hints(part).is_gate]
    return gates[0] if len(gates) == 1 and GATES in getattr(network, "outputs", ()) else None


def gate_logits(deployed: Deployed, pixels: Tensor) -> NDArray[Any]:
    """Compute the logits (P, N) of the gate, which exists, in the dtype that *deployed* uses for *pixels*."""
    gate = find_gate(deployed.network)
    computed: list[Tensor] = []
    hook = gate.feature.register_forward_hook(lambda _, _args, feature: computed.append(gate.logits(feature)))
    with hook, torch.no_grad():
        deployed(pixels)
    return computed[0].numpy()


def mark_decided(logits: NDArray[Any], chosen: int, tolerance: float) -> NDArray[np.bool_]:
    """Mark the images (P,) whose *chosen* largest gate logits (P, N) stay the largest within *tolerance*."""
    ranked = -np.sort(-logits, axis=1)  # (P, N), the largest first
    smallest_chosen = ranked[:, chosen - 1 : chosen]  # (P, 1)
    margins = smallest_chosen - ranked[:, chosen:]  # to each logit that is not chosen (P, N - chosen)
    return np.asarray((margins > 2 * tolerance).all(axis=1), dtype=np.bool_)  # the two logits may both drift


def compare_routes(
    exact: NDArray[Any], rounded: NDArray[Any], chosen: int, floors: float
) -> results.RoutingParity:
    """Find the images whose route to *chosen* components can be compared.

    *exact* and *rounded* are the gate logits (P, N) in float64 and in the exported precision; the tolerance
    is *floors* times their largest difference, or four roundings of the largest logit if these are more.
    """
    noise = max(FOUR_ROUNDINGS * float(np.abs(exact).max()), float(np.abs(rounded - exact).max()))
    decided = mark_decided(exact, chosen, floors * noise)
    compared = decided
    if not decided.any():  # then, rather than no image, those with the same route
        # A stable sort resolves ties in favor of the lower index, as the gate does.
        rankings = (np.argsort(-logits, axis=1, kind="stable") for logits in (exact, rounded))
        route, rounded_route = (np.sort(ranking[:, :chosen], axis=1) for ranking in rankings)
        compared = (route == rounded_route).all(axis=1)
    return results.RoutingParity(
        noise_floor=noise,
        tolerance=floors * noise,
        num_undecided=int((~decided).sum()),
        left_out=tuple(np.flatnonzero(~compared).tolist()),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityReference:
    """The float64 outputs of the network, its noise floor per output in *precision*, and undecided images."""

    outputs: Arrays
    noise_floor: dict[str, float]
    precision: Precision = "fp32"
    routing: results.RoutingParity | None = None


def compute_reference(
    deployed: Deployed,
    images: NDArray[np.uint8],
    run: BatchRun | None = None,
    precision: Precision = "fp32",
    gate: GateRun | None = None,
) -> ParityReference:
    """Compute the float64 outputs of *deployed* for *images* (P, H, W, 3) and the noise floor of *run*.

    *run* computes the outputs in *precision*, by default with *deployed* itself, and *gate* the gate logits.
    The images run in batches of 16, and the first four also alone. The noise floor of an output is the
    largest of the errors of these runs and of four roundings of its largest value to float32.
    Raises `ParityError` if outputs are not finite or the route of no image can be compared.
    """
    names, network64 = output_names(deployed.network), copy_module(deployed).double()
    with ReportsFloat32(), InFloat64():  # type: ignore[no-untyped-call]
        exact = _run_in_batches(network64, names, images, BATCH_IN_FLOAT64)
    if run is None:
        run = deployed
    runs = _run_in_batches(run, names, images, BATCH), _run_in_batches(run, names, images[:SINGLE_IMAGES], 1)
    routing = None
    if (gate_layer := find_gate(deployed.network)) is not None:
        pixels = torch.from_numpy(images)
        routing = compare_routes(
            exact=gate_logits(network64, pixels),
            rounded=gate_logits(deployed, pixels) if gate is None else gate(pixels),
            chosen=gate_layer.chosen,
            floors=results.FLOORS_BY_PRECISION[precision],
        )
    compared = compared_images(routing, len(images))
    if not compared.any():
        raise ParityError(
            f"the gate is undecided on every probe image and rounding to {precision} changes every route, "
            f"so no output can be compared; {UNDECIDED}"
        )
    noise_floor = {}
    for name, values in exact.items():
        rounded_values = [outputs[name] for outputs in runs]  # of all images, and of the first ones
        _require_finite(name, values, rounded_values, precision)
        noise_floor[name] = FOUR_ROUNDINGS * float(np.abs(values).max())
        for rounded in rounded_values:
            errors = np.abs(rounded - values[: len(rounded)])[compared[: len(rounded)]]
            noise_floor[name] = max(noise_floor[name], float(errors.max(initial=0.0)))
    return ParityReference(outputs=exact, noise_floor=noise_floor, precision=precision, routing=routing)


def _require_finite(
    name: str, exact: NDArray[Any], rounded: Sequence[NDArray[Any]], precision: Precision
) -> None:
    """Raise `ParityError` unless output *name* is finite: *exact* in float64, *rounded* in *precision*."""
    if not np.isfinite(exact).all():
        raise ParityError(f"the network's own {name} are not finite on the probe images; train it again")
    if not all(np.isfinite(values).all() for values in rounded):
        if precision == "fp32":
            remedy = "train it again with weight decay or a lower learning rate"
        else:
            remedy = "choose precision fp32"
        raise ParityError(
            f"the network's own {name} are not finite in {precision} on the probe images: activations "
            f"overflow; {remedy}"
        )


def compared_images(routing: results.RoutingParity | None, count: int) -> NDArray[np.bool_]:
    """Mark those of *count* images (P,) whose outputs are compared: *routing* does not leave them out."""
    compared = np.ones(count, dtype=np.bool_)
    if routing is not None:
        compared[list(routing.left_out)] = False
    return compared


def _run_in_batches(run: BatchRun, names: Sequence[str], images: NDArray[np.uint8], batch: int) -> Arrays:
    """Run *images* in batches of at most *batch* and concatenate the outputs by name."""
    pixels = torch.from_numpy(images)
    with torch.no_grad():
        chunks = [run(pixels[i : i + batch]) for i in range(0, len(pixels), batch)]
    by_name = [dict(zip(names, outputs, strict=True)) for outputs in chunks]
    return {name: torch.cat([outputs[name] for outputs in by_name]).numpy() for name in names}


def compare_file(
    session: ort.InferenceSession,
    model: onnx.ModelProto,
    expected: ParityReference,
    images: NDArray[np.uint8],
    batch: BatchRange,
    *,
    allow_drift: bool = False,
) -> results.ParityReport:
    """Compare the file that *session* has loaded with *expected* on uint8 *images* (P, H, W, 3).

    *model* is the content of the file; its operators and its size are reported.
    Raises `ParityError` if an output exceeds its tolerance or is not finite, or if a class changed despite a
    clear margin. With *allow_drift*, the report records these errors instead; values that are not finite
    always raise.
    """
    # The maximum is mostly even; an odd size detects a graph that works for even sizes only.
    below_maximum = max(min(batch.maximum - 1, LARGEST_BATCH), 1)
    sizes = sorted({1, min(2, batch.maximum), batch.optimum, below_maximum})
    by_size = {size: file_outputs(session, images, size) for size in sizes}
    routing = expected.routing
    compared = compared_images(routing, len(images))
    floors_allowed = results.FLOORS_BY_PRECISION[expected.precision]
    outputs = {}
    for name, exact in expected.outputs.items():
        single = by_size[1][name]
        outputs[name] = results.OutputParity(
            noise_floor=expected.noise_floor[name],
            tolerance=floors_allowed * expected.noise_floor[name],
            drift={str(size): max_drift(name, file[name], exact, compared) for size, file in by_size.items()},
            batch_difference=max(max_drift(name, file[name], single, compared) for file in by_size.values()),
        )
    logits = expected.outputs[results.LOGITS]
    report = results.ParityReport(
        precision=expected.precision,
        runtime=f"onnxruntime {ort.__version__}",
        provider=results.PROVIDER,
        num_images=len(images),
        floors_allowed=floors_allowed,
        outputs=outputs,
        spread=logit_spread(logits[compared]),
        flips=count_flips(
            by_size[1][results.LOGITS], logits, outputs[results.LOGITS].tolerance, rerouted=~compared
        ),
        routing=routing,
        operators=dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
        file_bytes=model.ByteSize(),
        drift_allowed=False,
    )
    violation = _first_violation(report)
    if violation is None:
        return report
    if allow_drift:
        return report.model_copy(update={"drift_allowed": True})
    if routing is not None and routing.num_undecided == report.num_images:
        violation += f"; the gate is undecided on every image, so rounding decides: {UNDECIDED}"
    raise ParityError(f"the exported file {violation}; nothing was written")


def count_flips(
    values: NDArray[Any], expected: NDArray[Any], tolerance: float, rerouted: NDArray[np.bool_]
) -> dict[results.FlipCause, int]:
    """Count the top classes that differ between logits *values* and *expected*, both (P, C), by cause.

    *rerouted* (P,) marks images whose gate chose other components.
    """
    top_of_network, top_of_file = expected.argmax(axis=1), values.argmax(axis=1)
    images = np.arange(len(expected))
    margins = expected[images, top_of_network] - expected[images, top_of_file]  # of the network (P,)
    is_small = margins <= 2 * tolerance  # both logits may drift, towards each other
    by_cause: dict[results.FlipCause, NDArray[np.bool_]] = {
        "noise": is_small & ~rerouted,
        "routing": rerouted,
        "error": ~is_small & ~rerouted,
    }
    flipped = top_of_network != top_of_file
    return {cause: int((mask & flipped).sum()) for cause, mask in by_cause.items()}


def logit_spread(logits: NDArray[Any]) -> float:
    """Compute the range over images of each class's logit in *logits* (P, C), and return the largest.

    A single image gives the range over its classes. The tolerance must be below half of the spread: a file
    that returns the middle of each range for every image has an error of half of the largest range.
    """
    return float(np.ptp(logits, axis=0 if len(logits) > 1 else 1).max())


def max_drift(name: str, values: NDArray[Any], expected: NDArray[Any], compared: NDArray[np.bool_]) -> float:
    """Compute the maximum absolute difference over the *compared* images (P,).

    Raises `ParityError` if the shapes differ or *values* are not finite.
    """
    if values.shape != expected.shape:
        raise ParityError(f"the exported file gives {name} of shape {values.shape}, not {expected.shape}")
    if not np.isfinite(values).all():
        raise ParityError(f"the exported file gives {name} that are not finite")
    return float(np.abs(values.astype(np.float64) - expected)[compared].max(initial=0.0))


def _first_violation(report: results.ParityReport) -> str | None:
    """Describe the first limit that *report* exceeds, if any; a cause is checked before its effects."""
    if report.unverifiable:
        if report.spread == 0:
            return "cannot be verified: the spread of the network's logits is 0; train longer"
        floor = report.logits.noise_floor
        advice = "train longer" if report.precision == "fp32" else "train longer, or choose precision fp32"
        too_large_share = report.smallest_unverifiable_share
        return (
            f"cannot be verified in {report.precision}: its noise floor of {floor:.3g} is "
            f"{floor / report.spread:.0%} of the spread of the logits, and at {too_large_share:.1%} or more "
            f"a file that ignores its input would pass; {advice}"
        )
    for name, output in report.outputs.items():
        if output.largest_drift > output.tolerance:
            return (
                f"drifts by {output.largest_drift:.3g} in {name} ({output.drift_in_floors:.1f}x noise floor, "
                f"limit {report.floors_allowed:.0f}x = {output.tolerance:.3g})"
            )
        if output.batch_difference > output.tolerance:
            return f"changes {name} by {output.batch_difference:.3g} when images are batched"
    if report.flips["error"]:
        return f"changes the top class of {report.flips['error']} of {report.num_images} images"
    return None
