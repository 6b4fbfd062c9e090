"""Images: no output of an image changes with the other images of its batch.

This is measured on the file, not proved. A batch of ordinary and of extreme images runs. Each
further run replaces half of its images by other ones, or by copies of those that stay. The shapes,
and so the kernels and their order of operations, are the same in all runs, so not one bit of the
outputs of an image that stays may change. `file` measures that an image gives the same in another
place, and in batches of other sizes.

Not seen: an operator that combines images only for values that none of these images causes. The dark,
letterboxed, half-plain and gray ones run in one batch only (`IN_OPTIMUM`), so nothing is exchanged beside them.

Refused: operators that combine rows of several images (`tests/export/prove/test_images.py`).
"""

import itertools
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import LoweringError
from sopdeploy_export.runs import LARGEST_BATCH, SINGLE_PROBES, Arrays, file_outputs

STATEMENT = (
    "The outputs for an image stay equal in every bit if the rest of its batch is replaced by ordinary or "
    "extreme images. With --set allow_batch_dependence=true, the bundle records which outputs change."
)
IS_PROVED = False
# Of the images of an export, those that fill a batch of the optimum: dark, letterboxed, half-plain and gray
# ones. All others run beside different images; at first these extreme ones, black, white, saturated and a
# checkerboard of single pixels, because values that are rare can decide whether images mix.
IN_OPTIMUM = (0, 2, 4, 5, 8)
EXTREME = (7, 1, 6, 3)


class FileRuns(NamedTuple):
    """The outputs (P, ...) of a file for P images by name, and the names of those that mix images.

    `in_optimum` are the outputs for the last `SINGLE_PROBES` images in a batch of the optimum, if it ran.
    """

    outputs: Arrays
    mixing: tuple[str, ...]
    in_optimum: Arrays


def run_file(
    session: ort.InferenceSession, images: NDArray[np.uint8], batch: BatchRange
) -> FileRuns:
    """Run the file on the *images* of an export, uint8 (P, H, W, 3), in batches that *batch* accepts.

    `IN_OPTIMUM` and the last `SINGLE_PROBES` run in batches of the optimum, and all but
    `IN_OPTIMUM` with several other images beside each.
    """
    count = len(IN_OPTIMUM)
    generated = range(count + len(EXTREME), len(images))
    numbers = [*IN_OPTIMUM, *EXTREME, *generated]

    filling_and_last = np.concatenate([images[numbers[:count]], images[-SINGLE_PROBES:]])
    in_optimum = file_outputs(session, filling_and_last, batch.optimum)
    outputs, mixing = run_with_neighbors(session, images[numbers[count:]], batch.maximum)

    # All images, in their order.
    order = np.argsort(numbers)
    outputs = {
        name: np.concatenate([in_optimum[name][:count], rows])[order]
        for name, rows in outputs.items()
    }
    return FileRuns(outputs, mixing, {name: rows[count:] for name, rows in in_optimum.items()})


def run_with_neighbors(
    session: ort.InferenceSession, images: NDArray[np.uint8], largest: int
) -> tuple[Arrays, tuple[str, ...]]:
    """Run the file on *images*, uint8 (P, H, W, 3), with several other images beside each.

    *largest* is the largest batch that the file accepts. Returns the outputs (P, ...) by name, and the
    names of those that mix images.
    """
    size = min(LARGEST_BATCH, largest)
    if size == 1:  # there are no other images
        return file_outputs(session, images, 1), ()

    # The first run.
    unused = itertools.cycle(range(len(images)))
    numbers = np.array([*itertools.islice(unused, size)])  # of the images in the batch
    before = file_outputs(session, images[numbers], size)
    by_number = {name: dict(zip(numbers, rows, strict=False)) for name, rows in before.items()}

    # Each further run, compared with the run before.
    mixing: dict[str, None] = {}
    for is_new, by_copies in _plan_replacements(size, len(images)):
        others = itertools.cycle(numbers[~is_new]) if by_copies else unused
        numbers = numbers.copy()
        numbers[is_new] = [*itertools.islice(others, int(is_new.sum()))]

        after = file_outputs(session, images[numbers], size)
        for name, rows in after.items():
            by_number[name].update(zip(numbers, rows, strict=False))
            if len(rows) != size or rows[~is_new].tobytes() != before[name][~is_new].tobytes():
                mixing[name] = None
        before = after

    outputs = {
        name: np.stack([row for _, row in sorted(rows.items())])
        for name, rows in by_number.items()
    }
    return outputs, tuple(mixing)


def _plan_replacements(size: int, count: int) -> list[tuple[NDArray[np.bool_], bool]]:
    """List which images of a batch of *size* each run replaces, and whether by copies of those that stay.

    In turn every other one and one half, so that a neighbour at any distance is replaced, until all of
    *count* images were in a batch; then the first half by copies of the others.
    """
    position = np.arange(size)
    is_even = position % 2 == 0
    is_first = position < size // 2
    halves = itertools.cycle([is_even, ~is_even, is_first, ~is_first])

    replaced: list[tuple[NDArray[np.bool_], bool]] = []
    num_run = size
    while num_run < count:
        is_new = next(halves)
        replaced.append((is_new, False))
        num_run += int(is_new.sum())
    return [*replaced, (is_first, True)]


def check_mixing(mixing: tuple[str, ...], *, allowed: bool) -> None:
    """Raise `LoweringError` if the outputs *mixing* mix images, unless this is *allowed*."""
    if mixing and not allowed:
        raise LoweringError(
            f"the network mixes images: {', '.join(mixing)} of an image change with the other images of its batch",
            remedies={"allow_batch_dependence": True},
        )
