"""Images: no output of an image changes with the other images of its batch.

This is measured on the file, not proved. Batches of ordinary and of extreme images run, and then
mixtures of two batches, in which each image keeps its place. The shapes, and so
the kernels and their order of operations, are the same in all runs, so not one bit of the outputs
of an image may change. `file` measures that an image gives the same in another place,
and in batches of other sizes.

Not seen: an operator that combines images only for values that none of these images causes.

Refused: operators that combine rows of several images (`tests/export/prove/test_images.py`).
"""

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from sopdeploy.errors import LoweringError
from sopdeploy_export.runs import file_outputs

STATEMENT = (
    "No bit of an output of the file changes when the other images of the batch are replaced, by ordinary or by "
    "extreme ones. Otherwise the export names the outputs."
)
IS_PROVED = False
LARGEST = 4  # images of a batch
# Positions of a batch. Each run has the images of one batch at these positions, and of another
# batch at the rest. For any two images of a batch, one run has the first without the second.
POSITIONS = ((0, 1), (0, 2))


def find_mixing(
    session: ort.InferenceSession, images: NDArray[np.uint8], largest: int
) -> tuple[str, ...]:
    """Name the outputs of the file that change with the other *images*, uint8 (P, H, W, 3), of a batch.

    *largest* is the largest batch that the file accepts.
    """
    size = min(LARGEST, largest)
    if size == 1:  # there are no other images
        return ()

    # The batches, and one of the first images again in other places: next to the first batch, it
    # puts copies beside images.
    batches = [
        np.take(images, range(start, start + size), axis=0, mode="wrap")
        for start in range(0, len(images), size)
    ]
    batches.append(np.roll(batches[0], 1, axis=0))
    outputs = [file_outputs(session, batch, size) for batch in batches]

    # Each batch with each other images of the batch before.
    mixing: dict[str, None] = {}
    for number, batch in enumerate(batches):
        for positions in POSITIONS:
            is_of_batch = np.isin(np.arange(size), positions)
            mixed = np.where(is_of_batch[:, None, None, None], batch, batches[number - 1])
            found = file_outputs(session, mixed, size)
            for name, rows in found.items():
                here, before = outputs[number][name], outputs[number - 1][name]
                if (
                    len(rows) != size
                    or rows[is_of_batch].tobytes() != here[is_of_batch].tobytes()
                    or rows[~is_of_batch].tobytes() != before[~is_of_batch].tobytes()
                ):
                    mixing[name] = None
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
