"""Classes that seem to be exchanged: the order of the names is not that of the logits.

Then nearly all images of a class are predicted as one other class, and in a circle.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

MIN_IMAGES = 3  # of a class
_SHARE = 0.5  # of the images of a class, and of the predictions of the other one


def describe_exchanged(labels: Sequence[str], confusion: ArrayLike) -> tuple[str, ...]:
    """Say which of *labels* seem to be exchanged, by *confusion* (C, C): true classes by predicted classes.

    There is a line for each circle of classes of which more than half of the images are predicted as
    the next class, and more than half of the predictions of this one are such images.
    """
    counts = np.asarray(confusion, np.int64)
    num_images = counts.sum(axis=1)
    num_predicted = counts.sum(axis=0)
    predicted = counts.argmax(axis=1)
    most = counts.max(axis=1)
    leads = (num_images >= MIN_IMAGES) & (most > _SHARE * num_images)
    leads &= most > _SHARE * num_predicted[predicted]

    lines = []
    seen = set[int]()
    for first in range(len(counts)):
        # Follow the classes until one leads nowhere, or the circle closes.
        circle = [first]
        while leads[circle[-1]] and predicted[circle[-1]] not in circle:
            circle.append(int(predicted[circle[-1]]))
        is_closed = leads[circle[-1]] and predicted[circle[-1]] == first
        if not is_closed or len(circle) == 1 or first in seen:
            continue
        seen.update(circle)

        names = [labels[number] for number in circle]
        if len(names) == 2:
            lines.append(
                f"{names[0]} and {names[1]} seem to be exchanged: check the order of the class names"
            )
        else:
            chain = " as ".join([*names, names[0]])
            lines.append(
                f"{len(names)} classes seem to be in another order (predicted in a circle: {chain}): check the "
                "order of the class names"
            )
    return tuple(lines)
