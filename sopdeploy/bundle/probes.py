"""Probes: a few images and the numbers they must give, replayed wherever a bundle is to be trusted.

`verify` replays them, the server does before it is ready, an engine build does after it. A probe
file is an `.npz` with `images` (P, H, W, 3) uint8 and, per output of the graph, `output_<name>`
float32 and `tolerance_<name>`, one absolute float64 bound derived at export.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sopdeploy.errors import BundleError, ParityError

Outputs = Mapping[str, NDArray[np.float32]]
Run = Callable[[NDArray[np.uint8]], Outputs]


@dataclass(frozen=True, kw_only=True, slots=True)
class Probes:
    """Images (P, H, W, 3) uint8, what each output must be for them, and within what bound."""

    images: NDArray[np.uint8]
    expected: dict[str, NDArray[np.float32]]
    tolerance: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """What a replay measured: the largest deviation per output and the bound it kept."""

    deviation: dict[str, float]
    tolerance: dict[str, float]
    images: int


def write_probes(path: Path, probes: Probes) -> None:
    """Write *probes* to *path*; the same probes give the same bytes."""
    arrays: dict[str, NDArray[np.generic]] = {"images": probes.images}
    for name, values in probes.expected.items():
        arrays[f"output_{name}"] = values
        arrays[f"tolerance_{name}"] = np.array(probes.tolerance[name], dtype=np.float64)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_probes(path: Path) -> Probes:
    """Return the probes at *path*; raises `BundleError` where the file is no probe file."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = [key.removeprefix("output_") for key in arrays if key.startswith("output_")]
            return Probes(
                images=np.asarray(arrays["images"], dtype=np.uint8),
                expected={name: arrays[f"output_{name}"] for name in names},
                tolerance={name: float(arrays[f"tolerance_{name}"]) for name in names},
            )
    except Exception as problem:  # whatever other content makes of numpy's reader
        raise BundleError(f"{path}: not a probe file; export the bundle again") from problem


def replay(probes: Probes, run: Run, *, batch: int = 1) -> Replay:
    """Run the probes in batches of *batch* and compare every output.

    Raises `ParityError` where an output is missing, has another shape, is not finite or deviates by
    more than its bound.
    """
    worst = dict.fromkeys(probes.expected, 0.0)
    for start in range(0, len(probes.images), batch):
        outputs = run(probes.images[start : start + batch])
        for name, expected in probes.expected.items():
            found = deviation(name, outputs, expected[start : start + batch])
            worst[name] = float(np.maximum(worst[name], found))  # keeps what is not a number
    for name, found in worst.items():
        if not found <= probes.tolerance[name]:
            raise ParityError(
                f"probes: output {name!r} deviates by {found:.3g}, the bound is "
                f"{probes.tolerance[name]:.3g}; this runtime does not compute the exported network"
            )
    return Replay(deviation=worst, tolerance=probes.tolerance, images=len(probes.images))


def deviation(name: str, outputs: Outputs, expected: NDArray[np.float32]) -> float:
    """Return the largest absolute difference of output *name* from *expected*."""
    if name not in outputs:
        raise ParityError(f"probes: the runtime gives no output {name!r}")
    values = outputs[name]
    if values.shape != expected.shape:
        raise ParityError(f"probes: output {name!r} is {values.shape}, not {expected.shape}")
    if not np.isfinite(values).all():
        raise ParityError(f"probes: output {name!r} is not finite")
    return float(np.abs(values.astype(np.float64) - expected).max(initial=0.0))
