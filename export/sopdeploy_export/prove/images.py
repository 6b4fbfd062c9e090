"""Images: no output of an image changes with the other images of its batch.

This is measured on the file, not proved. A batch of ordinary and of extreme images runs. Each
further run replaces half of its images by other ones, or by copies of those that stay. The shapes,
and so the kernels and their order of operations, are the same in all runs, so not one bit of the
outputs of an image that stays may change. `file` measures that an image gives the same in another
place, and in batches of other sizes.

Not seen: an operator that combines images only for values that none of these images causes.

Refused: operators that combine rows of several images (`tests/export/prove/test_images.py`).
"""

import itertools

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from sopdeploy.errors import LoweringError
from sopdeploy_export.runs import file_outputs

STATEMENT = (
    "If the other images of a batch are replaced by ordinary or extreme images, no bit of the outputs for an "
    "image changes. With --allow-batch-dependence, the bundle records which outputs change."
)
IS_PROVED = False
LARGEST = 4  # images of a batch


def find_mixing(
    session: ort.InferenceSession, images: NDArray[np.uint8], largest: int
) -> tuple[str, ...]:
    """Name the outputs of the file that change with the other *images*, uint8 (P, H, W, 3), of a batch.

    *largest* is the largest batch that the file accepts.
    """
    size = min(LARGEST, largest)
    if size == 1:  # there are no other images
        return ()

    # Which images of the batch each run replaces: in turn every other one and one half, so that a
    # neighbour at any distance is replaced, until all images were in a batch; then the first half by
    # copies of the others, and at last these others.
    position = np.arange(size)
    is_even = position % 2 == 0
    is_first = position < size // 2
    halves = itertools.cycle([is_even, ~is_even, is_first, ~is_first])
    num_rounds = -(-len(images) // size) - 1
    replaced = [*itertools.islice(halves, 2 * num_rounds), is_first, ~is_first]
    run_of_copies = len(replaced) - 2

    # The first run.
    unused = itertools.cycle(images)
    batch = np.stack([*itertools.islice(unused, size)])
    before = file_outputs(session, batch, size)

    # Each further run, compared with the run before.
    mixing: dict[str, None] = {}
    for run, is_new in enumerate(replaced):
        others = itertools.cycle(batch[~is_new]) if run == run_of_copies else unused
        batch = batch.copy()
        batch[is_new] = [*itertools.islice(others, int(is_new.sum()))]

        found = file_outputs(session, batch, size)
        for name, rows in found.items():
            if len(rows) != size or rows[~is_new].tobytes() != before[name][~is_new].tobytes():
                mixing[name] = None
        before = found
    return tuple(mixing)


def measure_images(
    session: ort.InferenceSession, images: NDArray[np.uint8], largest: int, *, allowed: bool
) -> tuple[str, ...]:
    """Name the outputs of the file that mix images; raise `LoweringError` unless this is *allowed*."""
    mixing = find_mixing(session, images, largest)
    if mixing and not allowed:
        raise LoweringError(
            f"the network mixes images: {', '.join(mixing)} of an image change with the other images of its batch",
            remedies={"allow_batch_dependence": True},
        )
    return mixing
