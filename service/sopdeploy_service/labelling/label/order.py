"""The order in which kept photographs are labelled: first of each object, uncertain and different ones."""

import numpy as np
from numpy.typing import NDArray

from sopdeploy.decision import softmax
from sopdeploy_service.labelling.kept import Kept

# Kept photographs count as of one object if they came within so many seconds and differ in so few
# bits of their near hashes. Of the frames of an object, 46 to 64 % do, of others at most 0.7 %.
OBJECT_SECONDS = 60.0
OBJECT_BITS = 14
MAX_SPREAD = 500  # photographs of a group that are chosen one by one; a session labels fewer


def find_repeated(kept: list[Kept]) -> set[str]:
    """Name the photographs of *kept*, the oldest first, that show the same object as an earlier one."""
    repeated = set[str]()
    earlier: list[tuple[float, int]] = []  # times and near hashes

    for photo in kept:
        taken_at = photo.record.time.timestamp()
        near_hash = int(photo.record.near_hash, 16)
        earlier = [
            (time, other) for time, other in earlier if time >= taken_at - OBJECT_SECONDS
        ]
        if any((near_hash ^ other).bit_count() <= OBJECT_BITS for _, other in earlier):
            repeated.add(photo.path.name)
        earlier.append((taken_at, near_hash))

    return repeated


def order_records(photos: list[Kept]) -> list[Kept]:
    """Order photographs by how useful their labels are; their bundles may have different classes."""
    names = {label for _, record in photos for label in record.labels}
    columns = {name: column for column, name in enumerate(sorted(names))}

    # Write the probabilities of each photograph into the columns of its classes.
    probabilities_NC = np.zeros((len(photos), len(names)))
    for row, (_, record) in zip(probabilities_NC, photos, strict=True):
        row[[columns[label] for label in record.labels]] = softmax(np.asarray(record.logits))

    # A photograph counts as known if its bundle has no threshold, so that `known` is None.
    known_N = np.asarray([record.known is not False for _, record in photos], np.bool_)
    return [photos[index] for index in order_by_value(probabilities_NC, known_N)]


def order_by_value(
    probabilities_NC: NDArray[np.float64], known_N: NDArray[np.bool_]
) -> NDArray[np.intp]:
    """Return the order (N,) of photographs with *probabilities_NC*: uncertain and different ones first.

    Those that are not *known_N* come last, because most of them show nothing that the network
    has to learn. In each group, the next one has the largest product of two numbers: its
    uncertainty, 1 minus the margin between its two largest probabilities (Scheffer et al., IDA
    2001), and the distance of its probabilities from the closest ones chosen before (k-center:
    Sener and Savarese, ICLR 2018). After `MAX_SPREAD`, the uncertainty decides alone.
    """
    # The smaller the margin between its two best classes, the more uncertain is a photograph. Two
    # columns of zeros are added, in case C is below 2.
    padded = np.pad(probabilities_NC, ((0, 0), (2, 0)))
    ascending = np.sort(padded, axis=1)
    uncertainties_N = 1 - (ascending[:, -1] - ascending[:, -2])

    # Take the known photographs first, then the unknown ones.
    order: list[int] = []
    for group in (np.flatnonzero(known_N), np.flatnonzero(~known_N)):
        # Indices of the L photographs of the group that are not chosen yet, the most uncertain
        # one first.
        left_L = group[np.argsort(-uncertainties_N[group], kind="stable")]
        distances_L = np.ones(len(left_L))  # to the closest one chosen before; at most 1

        # Choose the photograph that is uncertain and far from those chosen before, up to
        # `MAX_SPREAD` times.
        for _ in range(min(MAX_SPREAD, len(left_L))):
            # The position in *left_L* of the most useful one.
            best = int((distances_L * uncertainties_N[left_L]).argmax())
            order.append(int(left_L[best]))

            from_best_L = np.linalg.norm(
                probabilities_NC[left_L] - probabilities_NC[left_L[best]], axis=1
            )
            distances_L = np.delete(np.minimum(distances_L, from_best_L), best)
            left_L = np.delete(left_L, best)
        order += left_L.tolist()
    return np.asarray(order, np.intp)
