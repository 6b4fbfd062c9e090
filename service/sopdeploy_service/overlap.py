"""The probes of a bundle on a device that has two batches under way, as it will have under load."""

import numpy as np
from numpy.typing import NDArray

from sopdeploy.probes import Outputs, Probes, Run, replay
from sopdeploy_service.runtime.base import Overlapping


def replay_overlapping(probes: Probes, runtime: Overlapping, largest: int) -> None:
    """Replay *probes* in batches of at most *largest* behind a batch of other images, then before one.

    So numbers that reach into the memory of their neighbour show before the first request. Raises
    `ParityError`.
    """
    for place in (1, 0):
        replay(probes, beside_others(runtime, place), batch=largest)


def beside_others(runtime: Overlapping, place: int) -> Run:
    """Return a run whose images are the first (*place* 0) or the second (1) of two batches under way."""

    def run(images: NDArray[np.uint8]) -> Outputs:
        batches = [~images, ~images]
        batches[place] = images
        ends = [runtime.begin(list(batch)) for batch in batches]
        return [end() for end in ends][place]

    return run
