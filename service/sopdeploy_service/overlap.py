"""The probes of a bundle on a device that has two batches under way, as it will have under load."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sopdeploy.probes import Probes, replay
from sopdeploy_service.runtime.base import Overlapping

Outputs = dict[str, NDArray[np.float32]]


def replay_overlapping(probes: Probes, runtime: Overlapping, largest: int) -> None:
    """Replay *probes* in batches of at most *largest* behind a batch of other images, then before one.

    So numbers that reach into the memory of their neighbour show before the first request. Raises
    `ParityError`.
    """
    for run in (behind_another(runtime), before_another(runtime)):
        replay(probes, run, batch=largest)


def behind_another(runtime: Overlapping) -> Callable[[NDArray[np.uint8]], Outputs]:
    """Return a run that begins its images while others are at work."""

    def run(images: NDArray[np.uint8]) -> Outputs:
        other, these = runtime.begin(list(~images)), runtime.begin(list(images))
        other()
        return these()

    return run


def before_another(runtime: Overlapping) -> Callable[[NDArray[np.uint8]], Outputs]:
    """Return a run that begins others while its images are at work."""

    def run(images: NDArray[np.uint8]) -> Outputs:
        these, other = runtime.begin(list(images)), runtime.begin(list(~images))
        found = these()
        other()
        return found

    return run
