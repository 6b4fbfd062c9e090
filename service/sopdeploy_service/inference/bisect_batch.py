"""One bad image must not cost its neighbours their answer.

An exception from a batch is narrowed down by halving until the image that causes it fails alone;
an output that is not finite fails the image it belongs to.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.probes import Outputs
from sopdeploy_service.inference.results import ENGINE_FAILED, NONFINITE, OUT_OF_MEMORY, Rejection
from sopdeploy_service.runtime.base import DeviceLostError, OutOfMemoryError

Run = Callable[[Sequence[NDArray[np.uint8]]], Outputs]
Row = dict[str, NDArray[np.float32]] | Rejection

log = logging.getLogger("sopdeploy.engine")


@dataclass(slots=True)
class Budget:
    """How many more runs the halving may cost, so that an engine that always fails ends soon."""

    runs: int


def run_isolated(run: Run, images: Sequence[NDArray[np.uint8]], outputs: Sequence[str]) -> list[Row]:
    """Return for each of *images* (H, W, 3) its row of each of *outputs*, or why it has none.

    *run* takes some of them as one batch. At most `1 + 4 * log2(n)` runs, rounded up: enough to single out
    two bad images of n. Raises `DeviceLostError`: another run would fail too.
    """
    return halve(run, images, outputs, Budget(1 + 4 * (len(images) - 1).bit_length()))


def halve(run: Run, images: Sequence[NDArray[np.uint8]], outputs: Sequence[str], budget: Budget) -> list[Row]:
    """Run *images* as one batch and, where that raises, as two halves within *budget*."""
    if budget.runs == 0:
        return [ENGINE_FAILED] * len(images)
    budget.runs -= 1
    failure = ENGINE_FAILED
    try:
        return rows(run(images), outputs, len(images))
    except DeviceLostError:
        raise
    except OutOfMemoryError:
        log.warning("no memory for a batch of %d", len(images))
        failure = OUT_OF_MEMORY
    except Exception:  # a runtime may raise anything
        log.exception("the engine failed on a batch of %d", len(images))
    if len(images) == 1:
        return [failure]
    middle = len(images) // 2
    return [
        *halve(run, images[:middle], outputs, budget),
        *halve(run, images[middle:], outputs, budget),
    ]


def rows(found: Outputs, outputs: Sequence[str], images: int) -> list[Row]:
    """Return the rows of *outputs*; a row is refused where any output of its image is not finite.

    Raises `ValueError` where an output does not have one row for each of the *images*.
    """
    finite = np.ones(images, dtype=bool)
    for name, values in found.items():
        if len(values) != images:
            raise ValueError(f"output {name!r} has {len(values)} rows for {images} images")
        finite &= np.isfinite(values.reshape(images, -1)).all(axis=1)
    return [
        {name: found[name][place] for name in outputs} if finite[place] else NONFINITE
        for place in range(images)
    ]
