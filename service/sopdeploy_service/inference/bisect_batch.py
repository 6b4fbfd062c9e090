"""Isolate images that make a batch fail from the other images of the batch.

A batch that raises is halved until the image that causes it fails alone. An output that is not finite fails
only the image it belongs to.
"""

import logging
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.probes import Outputs
from sopdeploy_service.inference.results import ENGINE_FAILED, NONFINITE, OUT_OF_MEMORY, Rejection
from sopdeploy_service.runtime.base import DeviceLostError, OutOfMemoryError

Images = Sequence[NDArray[np.uint8]]
Run = Callable[[Images], Outputs]
Row = dict[str, NDArray[np.float32]] | Rejection

log = logging.getLogger("sopdeploy.engine")


def run_bisected(run: Run, images: Images, outputs: Sequence[str]) -> list[Row]:
    """Run *images* (H, W, 3) as one batch; halve it as long as it fails.

    Returns for each image its row of each of *outputs*, or a rejection.
    Makes at most 1 + 4 * ceil(log2(n)) runs, enough to find two bad images among n. Raises `DeviceLostError`,
    because another run would fail too.
    """
    runs_left = 1 + 4 * (len(images) - 1).bit_length()
    rows: list[Row] = []
    parts = [images]  # a stack: the first images are on top
    while parts:
        part = parts.pop()
        if runs_left == 0:
            rows += [ENGINE_FAILED] * len(part)
            continue
        runs_left -= 1
        rejection = ENGINE_FAILED
        try:
            rows += _split_rows(run(part), outputs, len(part))
            continue
        except DeviceLostError:
            raise
        except OutOfMemoryError:
            log.warning("out of memory for a batch of %d", len(part))
            rejection = OUT_OF_MEMORY
        except Exception:  # a runtime may raise anything
            log.exception("inference failed on a batch of %d", len(part))
        if len(part) == 1:
            rows.append(rejection)
        else:
            middle = len(part) // 2
            parts += [part[middle:], part[:middle]]
    return rows


def _split_rows(values: Outputs, outputs: Sequence[str], images: int) -> list[Row]:
    """Split the batch into rows; reject rows with an output that is not finite."""
    finite = np.ones(images, dtype=bool)
    for name, batch in values.items():
        if len(batch) != images:
            raise ValueError(f"output {name!r} has {len(batch)} rows for {images} images")
        finite &= np.isfinite(batch.reshape(images, -1)).all(axis=1)
    return [
        {name: values[name][row] for name in outputs} if finite[row] else NONFINITE for row in range(images)
    ]
