"""Compare the exported ONNX file, loaded from disk, with the network it was exported from.

The reference is the network in float64. The noise floor is the error of the network's own run in the exported
precision. Every output must stay within its tolerance at every tested batch size, and must not depend on the
other images of the batch. A changed top class or gate route is an error unless the network's margin is so
small that rounding can change it. If the comparison fails, *locate* names the first module that is wrong.

The matrix square roots of second-order modules are checked in the exported dtypes: symmetry, residual, and
distance from R*, the result of N Newton-Schulz steps in float64 on the same feature maps. The comparison of
outputs does not detect an inaccurate iteration, which raises the noise floor of the network as well.

Bounds. For a root R, let e = ||R - R*|| / ||R*|| in Frobenius norms, and e0 the same error of the library's
own implementation in the same dtypes. Two limits apply: e <= `ROOT_FLOORS` * e0, and e <= `_error_limit`, the
largest error that rounding can cause in N steps. The second one detects errors of both implementations, such
as TF32 products. The other bounds follow from e: R* is symmetric, so ||R - R^T|| <= 2 e ||R*||, and with
S = R* R* <= covariance, ||R R - R* R*|| <= 2 e ||R*||_2 ||R*|| <= 2 e d^(1/4) ||covariance||, since
||R*||_2^2 <= ||S|| and ||R*||^2 <= trace(S) <= sqrt(d) ||S||.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sopdeploy.bundle.manifest import BatchRange, Precision
from sopdeploy.errors import ParityError
from sopdeploy.layers.covariance import (
    centered,
    centered_and_scaled,
    covariance,
    covariance_trace,
    frobenius_norm,
)
from sopdeploy.layers.export_hints import export_hints
from sopdeploy.layers.isqrt_cov import SMALLEST_NORM, covariance_root
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig
from sopdeploy_export.graph import PREFIX, Deployed, InFloat64, output_names
from sopdeploy_export.parity.onnx_file import EMULATION, file_outputs, has_bfloat16, open_session
from sopdeploy_export.parity.report import (
    FLOORS_BY_PRECISION,
    GATES,
    LOGITS,
    PROVIDER,
    OutputParity,
    ParityReport,
    Routing,
    SpectralRecord,
    agreement,
    compared,
    find_gate,
    find_routes,
    gate_logits,
    rerouted,
    routing_parity,
)

Arrays = dict[str, NDArray[Any]]
Run = Callable[[Tensor], tuple[Tensor, ...]]
Gate = Callable[[Tensor], NDArray[Any]]
SINGLE_IMAGES, BATCH, LARGEST_BATCH = 4, 16, 63  # batches larger than LARGEST_BATCH may exceed the memory
UNDECIDED = "add --probes DIR with images from the target domain, or train longer"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The float64 outputs of the network, its noise floor per output in *precision*, and its routes."""

    outputs: Arrays
    noise_floor: dict[str, float]
    precision: Precision = "fp32"
    routing: Routing | None = None

    @property
    def floors(self) -> float:
        """The allowed drift as a multiple of the noise floor."""
        return FLOORS_BY_PRECISION[self.precision]


def compute_reference(
    deployed: Deployed,
    images: NDArray[np.uint8],
    own: Run | None = None,
    precision: Precision = "fp32",
    own_gate: Gate | None = None,
) -> Reference:
    """Compute the float64 outputs of *deployed* for *images* (P, H, W, 3) and the noise floor of *own*.

    *own* runs the network in *precision*, by default *deployed* itself; *own_gate* computes the gate logits
    in *precision*. *own* runs in batches of 16 and image by image; the noise floor is the larger of the two
    errors. Raises `ParityError` if outputs are not finite or the gate is undecided on every image.
    """
    own = own or deployed
    names, network64 = output_names(deployed.network), copy.deepcopy(deployed).double()
    with InFloat64():
        exact = network_outputs(network64, names, images, BATCH)
    batched = network_outputs(own, names, images, BATCH)
    single = network_outputs(own, names, images[:SINGLE_IMAGES], 1)
    routes, kept = None, np.ones(len(images), dtype=bool)
    if (gate := find_gate(deployed.network)) is not None:
        pixels = torch.from_numpy(images)
        own_logits = gate_logits(deployed, pixels) if own_gate is None else own_gate(pixels)
        exact_logits, allowed = gate_logits(network64, pixels), FLOORS_BY_PRECISION[precision]
        routes = find_routes(exact_logits, own_logits, gate.chosen, allowed)
        kept = routes.comparable
    if not kept.any():
        raise ParityError(
            f"the gate is undecided on every probe image and rounding to {precision} changes every route, "
            f"so no output can be compared; {UNDECIDED}"
        )
    floors = {}
    for name, values in exact.items():
        if not np.isfinite(values).all():
            raise ParityError(f"the network's own {name} are not finite on the probe images; train it again")
        if not (np.isfinite(batched[name]).all() and np.isfinite(single[name]).all()):
            worst = int(np.isfinite(batched[name]).all(axis=1).argmin())
            raise ParityError(_overflow(deployed, name, precision, images[worst : worst + 1]))
        floors[name] = max(
            4 * float(np.finfo(np.float32).eps) * float(np.abs(values).max()),
            float(np.abs(batched[name] - values)[kept].max(initial=0.0)),
            float(np.abs(single[name] - values[:SINGLE_IMAGES])[kept[:SINGLE_IMAGES]].max(initial=0.0)),
        )
    return Reference(outputs=exact, noise_floor=floors, precision=precision, routing=routes)


def network_outputs(run: Run, names: Sequence[str], images: NDArray[np.uint8], batch: int) -> Arrays:
    """Run *images* in batches of at most *batch* and concatenate the outputs by name."""
    pixels = torch.from_numpy(images)
    with torch.no_grad():
        chunks = [run(pixels[i : i + batch]) for i in range(0, len(pixels), batch)]
    joined = (torch.cat(values).numpy() for values in zip(*chunks, strict=True))
    return dict(zip(names, joined, strict=True))


ROOT_IMAGES = 4
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11}
ROOT_FLOORS = {"float32": FLOORS_BY_PRECISION["fp32"], "float16": FLOORS_BY_PRECISION["fp16"]}


def spectral_records(network: nn.Module, pixels: Tensor) -> tuple[SpectralRecord, ...]:
    """Measure the roots of every second-order module of *network* on four images of *pixels* (P, H, W, 3)."""
    seen: dict[str, tuple[Tensor, ...]] = {}

    def keep(name: str, _part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.setdefault(name, inputs)

    parts: dict[str, Any] = {
        name: part for name, part in network.named_modules() if export_hints(part).computes_roots
    }
    handles = [part.register_forward_pre_hook(partial(keep, name)) for name, part in parts.items()]
    try:
        with torch.no_grad():
            network(pixels[:ROOT_IMAGES])
    finally:
        for handle in handles:
            handle.remove()
    records = []
    for name, inputs in seen.items():
        if parts[name].config is None:
            continue
        inner = [child for child, part in parts[name].named_children() if export_hints(part).computes_roots]
        records.append(measure_root(".".join([name.removeprefix(PREFIX), *inner]), parts[name], inputs))
    return tuple(records)


@torch.no_grad()
def measure_root(name: str, part: Any, inputs: tuple[Tensor, ...]) -> SpectralRecord:
    """Compare the roots that *part* computes from *inputs* with N Newton-Schulz steps in float64."""
    config: NewtonSchulzConfig = part.config
    maps, root = part.roots(*inputs)
    exact = covariance_root(maps.double(), config)
    squared = covariance(centered_and_scaled(maps.double()))
    if not config.compensate:
        norm = covariance_trace(squared) if config.prenorm == "trace" else frobenius_norm(squared)
        squared = squared / norm.clamp_min(SMALLEST_NORM)
    own_error = _relative_norm(covariance_root(maps, config) - exact, exact)
    smallest = max(ROUNDOFF[config.stored], 8 * ROUNDOFF["float32"])
    return SpectralRecord(
        part=name,
        iterations=config.iterations,
        stored=config.stored,
        asymmetry=_relative_norm(root - root.transpose(1, 2), exact),
        residual=_relative_norm(root.double() @ root.double() - squared, squared),
        residual_exact=_relative_norm(exact @ exact - squared, squared),
        distance=_relative_norm(root - exact, exact),
        allowed=min(ROOT_FLOORS[config.stored] * max(own_error, smallest), _error_limit(maps, config)),
        width=maps.shape[1],
    )


def _error_limit(maps: Tensor, config: NewtonSchulzConfig) -> float:
    """Bound the relative error that rounding can cause in the root of *maps* (P, d, H, W).

    Each step has three products. Each product rounds its stored result once, and its sums of d terms lose
    sqrt(d) roundoffs, because rounding errors have random signs (Higham and Mary, 2019). An error in a
    direction without variance grows by 3/2 per step. Centering loses precision in proportion to the ratio
    between the maps and their deviations from the mean.
    """
    products, sums = 3 * config.iterations, math.sqrt(maps.shape[1])
    stored, float32 = ROUNDOFF[config.stored], ROUNDOFF["float32"]
    deviations = centered(maps.double())
    sizes = torch.linalg.vector_norm(deviations, dim=(1, 2)).clamp_min(SMALLEST_NORM)
    offset = float((torch.linalg.vector_norm(maps.double(), dim=(1, 2, 3)) / sizes).max())
    return 1.5**config.iterations * (products * (stored + sums * float32) + 4 * offset * float32)


def violation(records: tuple[SpectralRecord, ...]) -> str | None:
    """Describe the first violated invariant of *records*; None if all hold."""
    for found in records:
        moved = abs(found.residual - found.residual_exact)
        steps, allowed = found.iterations, found.allowed
        checks = (
            ("the root is not symmetric: asymmetry", found.asymmetry, 2 * allowed),
            (f"the residual of {steps} steps differs: by", moved, 2 * found.width**0.25 * allowed),
            (f"the root differs from that of {steps} steps: by", found.distance, allowed),
        )
        for what, value, limit in checks:
            if not value <= limit:  # also true for NaN
                return f"{found.part}: {what} {value:.2g}, limit {limit:.2g}"
    return None


def _relative_norm(difference: Tensor, reference: Tensor) -> float:
    """Compute the maximum of ||difference|| / ||reference|| over all matrices with a reference above 0."""
    sizes = torch.linalg.matrix_norm(reference.double())
    ratios = torch.linalg.matrix_norm(difference.double()) / sizes.clamp_min(1e-12)
    return float(ratios[sizes > 1e-12].max()) if bool((sizes > 1e-12).any()) else 0.0


Locate = Callable[[Path], str | None]


def compare(
    path: Path,
    expected: Reference,
    images: NDArray[np.uint8],
    batch: BatchRange,
    operators: dict[str, int],
    *,
    allow_drift: bool = False,
    locate: Locate = lambda _: None,
) -> ParityReport:
    """Compare the ONNX file at *path* with *expected* on uint8 *images* (P, H, W, 3).

    *operators*, the node counts of the file, go into the report. If the comparison fails, *locate* returns a
    sentence about the first wrong module. Raises `ParityError` if an output exceeds its tolerance or is not
    finite, or if a class or route changed despite a clear margin. With *allow_drift*, the report records
    these errors instead; values that are not finite always raise.
    """
    session = open_session(path)
    sizes = sorted({1, min(2, batch.maximum), batch.optimum, min(batch.maximum - 1, LARGEST_BATCH) or 1})
    found = {size: file_outputs(session, images, size) for size in sizes}
    routes, other = expected.routing, np.zeros(len(images), dtype=bool)
    if routes is not None:
        other = np.any([rerouted(outputs[GATES], routes) for outputs in found.values()], axis=0)
    kept = compared(other, routes) if routes is not None else ~other
    outputs = {}
    for name, exact in expected.outputs.items():
        tolerance = expected.floors * expected.noise_floor[name]
        outputs[name] = OutputParity(
            noise_floor=expected.noise_floor[name],
            tolerance=tolerance,
            drift={str(size): max_drift(name, values[name], exact, kept) for size, values in found.items()},
            batch_difference=max(
                max_drift(name, values[name], found[1][name], kept) for values in found.values()
            ),
        )
    if not kept.any():
        raise ParityError(f"the exported file routes every image to other components; {UNDECIDED}")
    top1 = agreement(found[1][LOGITS], expected.outputs[LOGITS], outputs[LOGITS].tolerance, ~kept)
    routing = None if routes is None else routing_parity(other, routes)
    passed = (
        all(max(o.largest_drift, o.batch_difference) <= o.tolerance for o in outputs.values())
        and top1.flips == 0
        and (routing is None or routing.wrong == 0)
    )
    report = ParityReport(
        precision=expected.precision,
        runtime=f"onnxruntime {ort.__version__}",
        provider=PROVIDER,
        emulation=EMULATION if has_bfloat16(onnx.load(path)) else None,
        images=len(images),
        floors_allowed=expected.floors,
        outputs=outputs,
        spread=logit_spread(expected.outputs[LOGITS][kept]) if expected.precision != "fp32" else None,
        top1=top1,
        routing=routing,
        first_over_floor=None if passed else locate(path),
        operators=operators,
        file_bytes=path.stat().st_size,
        passed=passed,
        drift_allowed=allow_drift and not passed,
    )
    if report.unverifiable:
        report = report.model_copy(update={"passed": False, "drift_allowed": allow_drift})
    if not report.passed and not allow_drift:
        raise ParityError(_error_message(report))
    return report


def logit_spread(logits: NDArray[Any]) -> float:
    """Compute the range over images of each class's logit in *logits* (P, C), and return the largest.

    A single image gives the range over its classes. A file that returns the same logits for every image has
    an error of at least half of this range.
    """
    return float(np.ptp(logits, axis=0 if len(logits) > 1 else 1).max())


def add_spectral_records(
    report: ParityReport, records: tuple[SpectralRecord, ...], *, allow_drift: bool
) -> ParityReport:
    """Add the *records* of second-order modules to *report*.

    Raises `ParityError` if a record violates an invariant, unless *allow_drift* is set.
    """
    broken = violation(records)
    passed = report.passed and broken is None
    checked = report.model_copy(
        update={
            "spectral": records,
            "broken": broken,
            "passed": passed,
            "drift_allowed": allow_drift and not passed,
        }
    )
    if broken is not None and not allow_drift:
        raise ParityError(_error_message(checked))
    return checked


def _overflow(deployed: Deployed, output: str, precision: Precision, image: NDArray[np.uint8]) -> str:
    """Build the error message for an *output* of *image* (1, H, W, 3) that is not finite in *precision*.

    It suggests a precision with a wider range. Float32 has the widest, so its message names the first module
    with an output that is not finite.
    """
    message = f"the network's own {output} are not finite in {precision} on the probe images"
    if precision != "fp32":
        wider = "bf16-backbone or fp32" if precision == "fp16" else "fp32"
        return f"{message}: activations overflow; choose --precision {wider}"
    infinite: list[str] = []

    def record(name: str, _part: nn.Module, _inputs: Any, result: Any) -> None:
        if isinstance(result, Tensor) and not bool(result.isfinite().all()):
            infinite.append(name)

    named = [(name, part) for name, part in deployed.network.named_modules() if name]
    handles = [part.register_forward_hook(partial(record, name)) for name, part in named]
    try:
        with torch.no_grad():
            deployed(torch.from_numpy(image))
    finally:
        for handle in handles:
            handle.remove()
    first, largest = next(iter(infinite), output), float(np.finfo(np.float32).max)
    return (
        f"{message}: activations exceed {largest:.2g} from {first} on, and no --precision has "
        "a wider range; train it again with weight decay or a lower learning rate"
    )


def max_drift(name: str, values: NDArray[Any], expected: NDArray[Any], kept: NDArray[np.bool_]) -> float:
    """Compute the maximum absolute difference over the *kept* images (P,).

    Raises `ParityError` if the shapes differ or *values* are not finite.
    """
    if values.shape != expected.shape:
        raise ParityError(f"the exported file gives {name} of shape {values.shape}, not {expected.shape}")
    if not np.isfinite(values).all():
        raise ParityError(f"the exported file gives {name} that are not finite")
    return float(np.abs(values.astype(np.float64) - expected)[kept].max(initial=0.0))


def _error_message(report: ParityReport) -> str:
    what = f"changes the top class of {report.top1.flips} of {report.images} images"
    for name, output in report.outputs.items():
        if output.largest_drift > output.tolerance:
            what = (
                f"drifts by {output.largest_drift:.3g} in {name} ({output.drift_in_floors:.1f}x noise floor, "
                f"limit {report.floors_allowed:.0f}x = {output.tolerance:.3g})"
            )
        elif output.batch_difference > output.tolerance:
            what = f"changes {name} by {output.batch_difference:.3g} when images are batched"
    routing = report.routing
    if routing is not None and routing.wrong:
        what = f"routes {routing.wrong} of {report.images} images to components that the gate did not choose"
    if report.unverifiable:
        floor = report.logits.noise_floor
        what = (
            f"cannot be verified in {report.precision}: its noise floor of {floor:.3g} is "
            f"{floor / max(report.spread or 0.0, floor * 1e-6):.0%} of the spread of the logits, and at "
            f"{0.5 / report.floors_allowed:.1%} or more a file that ignores its input would pass; train "
            "longer, or choose --precision fp32"
        )
    if report.broken is not None:
        what = f"violates an invariant of a second-order module: {report.broken}"
    if report.first_over_floor is not None:
        what += f"; {report.first_over_floor}"
    elif routing is not None and routing.flips and routing.undecided == report.images:
        what += "; the gate is undecided on every image, so rounding decides: train longer"
    return f"the exported file {what}; nothing was written (--allow-drift records the error and continues)"
