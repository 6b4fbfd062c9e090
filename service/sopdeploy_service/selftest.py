"""`GET /selftest`: does the engine, as it is now, still give the numbers the bundle promises?

The probes go the way of every request, through the waiting line and the engine's own thread, so a device that
went wrong since the start shows. What was said at the start (`verify`) is not asked again, but measured.
"""

import asyncio
import time

import numpy as np

from sopdeploy.errors import BundleError, ParityError
from sopdeploy.probes import Probes, deviation, read_probes
from sopdeploy_service.model import Model
from sopdeploy_service.outcome import Answered, Refusal
from sopdeploy_service.schema import SelfTest
from sopdeploy_service.service import Service
from sopdeploy_service.timing import Stages


async def self_test(service: Service, model: Model, deadline: float) -> SelfTest | Refusal:
    """Replay the probes of *model* through *service*; a refusal where that, or the comparison, fails."""
    try:
        probes = await asyncio.to_thread(read_probes, model.bundle.probes)
    except (
        BundleError
    ) as problem:  # the folder was moved or changed since the start; the engine has its own copy
        return Refusal("selftest_failed", 500, f"the probes are not where they were: {problem}")
    started = time.monotonic()
    room = min(len(probes.images), service.settings.queue_size, model.largest_batch)
    answers: list[Answered] = []
    for start in range(0, len(probes.images), room):
        found = await service.infer(model, probes.images[start : start + room], deadline, Stages())
        if isinstance(found, Refusal):
            return found
        for outcome in found:
            if isinstance(outcome, Refusal):
                return outcome
            answers.append(outcome)
    try:
        measured = {name: compare(name, probes, answers) for name in probes.expected}
    except ParityError as problem:
        return Refusal("selftest_failed", 500, str(problem))
    return SelfTest(
        model=model.name,
        version=model.version,
        images=len(answers),
        deviation=measured,
        tolerance=probes.tolerance,
        seconds=round(time.monotonic() - started, 3),
    )


def compare(name: str, probes: Probes, answers: list[Answered]) -> float:
    """Return by how much output *name* deviates; raises `ParityError` where that is beyond its bound."""
    found = {name: np.stack([answer.outputs[name] for answer in answers])}
    off = deviation(name, found, probes.expected[name])
    if not off <= probes.tolerance[name]:
        raise ParityError(
            f"output {name!r} deviates by {off:.3g}, the bound is {probes.tolerance[name]:.3g}; "
            "take this server out and look at its device"
        )
    return off
