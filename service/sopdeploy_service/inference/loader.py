"""Load a bundle: check its files, choose a runtime, and replay the probes through it.

`verify`, `predict` and the server all load bundles here, so none of them uses a network that
this machine computes wrongly. The runtime `auto` is the first one that is set up here, and only
that one: if the GPU was meant and does not work, the server ends with an error instead of
silently using the CPU.
"""

import itertools
import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sopdeploy.base.environment import install_command
from sopdeploy.base.plugins import RUNTIMES
from sopdeploy.bundle.folder import Bundle, open_bundle
from sopdeploy.bundle.probes import (
    Outputs,
    Probes,
    Replay,
    check_replays,
    compare_outputs,
    read_probes,
    replay,
)
from sopdeploy.bundle.signing import check_signature, read_signature, signature_path
from sopdeploy.errors import RuntimeUnavailableError, SopdeployError, first_line
from sopdeploy.images.limits import describe_formats, missing_extra
from sopdeploy_service.inference import daemon_threads
from sopdeploy_service.inference.load_time import finish_in_time, wait_in_time
from sopdeploy_service.runtime.base import (
    InexactRuntime,
    OpenRuntime,
    OverlappingRuntime,
    OwnRuntime,
    Runtime,
    is_out_of_memory,
    padded_sizes,
    translating_errors,
)
from sopdeploy_service.runtime.choice import cpu_runtime
from sopdeploy_service.settings import Settings

# Larger batches gain nothing on a CPU, and delay the first image of the batch
LARGEST_ON_CPU = 4

log = logging.getLogger("sopdeploy.inference")

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A verified bundle and its runtime.

    After a thorough load, the bundle has all its contents; otherwise it is `reduced`. `replays`
    maps batch sizes to replays of the probes. `timings` has (images, seconds) of each run.
    """

    bundle: Bundle
    runtime: Runtime
    replays: dict[int, Replay]
    timings: tuple[tuple[int, float], ...] = ()


def load_model(path: Path, settings: Settings) -> LoadedModel:
    """Load the bundle at *path* and replay its probes, in the time that *settings* allow.

    One of the probes runs alone, the others in batches of the largest size.

    Raises `BundleError`, `RuntimeUnavailableError`, also for a load that takes too long,
    `ConfigError` for an invalid key file, and `ParityError`.
    """
    return load_bundle(open_in_time(path, settings), settings)


def open_in_time(path: Path, settings: Settings) -> Bundle:
    """Open the bundle at *path* in the time that *settings* allow.

    Raises `BundleError`, and `RuntimeUnavailableError` if it takes longer.
    """
    opening = daemon_threads.start(partial(open_bundle, path))
    return wait_in_time(opening, path, settings)


def load_bundle(bundle: Bundle, settings: Settings, *, thorough: bool = False) -> LoadedModel:
    """Load *bundle*, which was read, as `load_model` does.

    With *thorough*, all probes run both alone and in batches. On a CPU, this would be most of the
    start time of a server.
    """
    return wait_in_time(_begin_load(bundle, settings, thorough=thorough), bundle.path, settings)


async def load_in_background(bundle: Bundle, settings: Settings) -> LoadedModel:
    """Load *bundle*, which was read, as `load_model` does, while the event loop runs."""
    return await finish_in_time(_begin_load(bundle, settings), bundle.path, settings)


def _begin_load(
    bundle: Bundle, settings: Settings, *, thorough: bool = False
) -> Future[LoadedModel]:
    """Load *bundle* in a daemon thread; close its runtime if nobody waits for it any more."""
    load = partial(_load, bundle, settings, thorough=thorough)
    return daemon_threads.start(load, discard=lambda loaded: loaded.runtime.close())


def _load(bundle: Bundle, settings: Settings, *, thorough: bool) -> LoadedModel:
    """Load *bundle* as `load_model` does, in this thread and without a limit of time."""
    check_trust(bundle, settings)
    for refusal in describe_refusals(bundle):
        log.warning("%s: %s", bundle.name, refusal)

    with ExitStack() as stack:
        runtime = open_runtime(bundle, settings)
        stack.callback(runtime.close)  # unless everything below succeeds
        with translating_errors(runtime):
            max_batch = largest_batch(runtime, settings)
            probes = read_probes(bundle)
            if isinstance(runtime, InexactRuntime) and runtime.accepted_errors:
                probes = probes.accepting(runtime.accepted_errors)
                log.warning(
                    "%s: the numerical error of its engine exceeds the tolerance of the bundle, "
                    "which was allowed when it was built",
                    bundle.name,
                )
            timings = warm_up(probes, runtime, max_batch)
            replays = _replay_all(probes, runtime, max_batch, timings, thorough=thorough)
        stack.pop_all()

    return LoadedModel(
        bundle=bundle if thorough else bundle.reduced(),
        runtime=runtime,
        replays=replays,
        timings=tuple(timings),
    )


def check_trust(bundle: Bundle, settings: Settings) -> None:
    """Check the signature of *bundle* if *settings* require it; raises `BundleError`, `ConfigError`."""
    if settings.require_signature is not None:
        signature = read_signature(signature_path(bundle.path), bundle.path)
        check_signature(bundle, signature, settings.require_signature)


def describe_refusals(bundle: Bundle) -> Iterator[str]:
    """Say which formats of the photographs of *bundle* a server that accepts *formats* refuses."""
    origin = bundle.manifest.origin
    if origin is None:  # it does not say what the network has learned from
        return

    for name in origin.formats:
        extra = missing_extra(name)
        if extra:
            remedy = install_command(f".[{extra}]")
            yield f"photos in {describe_formats([name])}, as it learned from, are refused; {remedy}"


def open_runtime(bundle: Bundle, settings: Settings) -> Runtime:
    """Open the runtime of *settings*, for `auto` the first one here, or raise `RuntimeUnavailableError`."""
    # Choose the runtime: `auto` takes the first one that is set up, those for GPUs before others.
    name: str = settings.runtime
    if name == "auto":
        own: dict[str, type[OwnRuntime]] = RUNTIMES.own()
        reasons = (
            (other, own[other].reason_for_auto(bundle, settings)) for other in reversed(own)
        )
        name, reason = next((other, text) for other, text in reasons if text is not None)
        log.info("%s: runtime %s: %s", bundle.name, name, reason)

    # Open it. `auto` does not fall back to the CPU.
    try:
        return _open_named(name, bundle, settings)
    except RuntimeUnavailableError as error:
        if settings.runtime != "auto" or name == cpu_runtime():  # else `auto` has chosen a GPU
            raise
        raise RuntimeUnavailableError(
            f"{name} is set up here but does not work: {error} "
            f"(SOPDEPLOY_RUNTIME={cpu_runtime()} would serve from the CPU)"
        ) from error


def _open_named(name: str, bundle: Bundle, settings: Settings) -> Runtime:
    """Open the runtime *name*, of this project or of another package."""
    open_registered: OpenRuntime | None = RUNTIMES.find(name)
    if open_registered is None:
        raise RuntimeUnavailableError(
            f"runtime {name!r}: no installed package has it; choose another one"
        )

    try:
        return open_registered(bundle, settings)
    except SopdeployError:
        raise
    except Exception as error:  # code of others
        reason = (
            f"{name} cannot open {bundle.path} ({first_line(error)}); choose another runtime"
        )
        raise RuntimeUnavailableError(reason) from error


def warm_up(probes: Probes, runtime: Runtime, max_batch: int) -> list[tuple[int, float]]:
    """Run batches of 1, 2, 4 ... *max_batch* images twice on a GPU, and check their outputs.

    Returns (images, seconds) of each run. Raises `ParityError`.

    The first batch of a size takes many times as long as the others: libraries choose kernels
    and allocate memory. Without this function, it would be a client's batch. Every row of every
    batch is compared with the output of its image, because other sizes have other kernels. The
    second time, small and large batches alternate, so that an engine changes its profile.

    A CPU has no such cost. It runs *max_batch* images once if there are fewer probes, because
    `_replay_all` then runs smaller batches only.
    """
    # Choose the sizes to run.
    timings: list[tuple[int, float]] = []
    if runtime.device == "cpu":
        sizes = [max_batch] if max_batch > len(probes.images) else []
    else:
        ascending = padded_sizes(max_batch)

        # The smallest, the largest, the second smallest, the second largest and so on.
        alternating = itertools.chain.from_iterable(
            zip(ascending, reversed(ascending), strict=True)
        )
        sizes = [*ascending, *itertools.islice(alternating, len(ascending))]

    # Run the batches; with too little memory for one, larger ones are left out.
    largest_to_try = max_batch
    for size in sizes:
        if size > largest_to_try:  # there was no memory for a smaller one
            continue

        batch = probes.repeat_to(size)
        try:
            started = time.monotonic()
            outputs = runtime.run(batch.images)
            timings.append((size, time.monotonic() - started))
        except Exception as error:  # libraries raise types of their own if memory is missing
            if size == 1 or not is_out_of_memory(error):
                raise
            log.warning(
                "out of memory for a batch of %d; the server will halve such batches", size
            )
            largest_to_try = size - 1
        else:
            check_replays([compare_outputs(batch, outputs, size)])

    return timings


def _replay_all(
    probes: Probes,
    runtime: Runtime,
    max_batch: int,
    timings: list[tuple[int, float]],
    *,
    thorough: bool,
) -> dict[int, Replay]:
    """Replay *probes*; add (images, seconds) of each run to *timings*.

    The first one runs alone, the others in batches; with *thorough*, all run in both ways. If
    the runtime can have two batches in flight, all also run beside others. Raises `ParityError`.
    """

    def timed_run(images: NDArray[np.uint8]) -> Outputs:
        started = time.monotonic()
        outputs = runtime.run(images)
        timings.append((len(images), time.monotonic() - started))
        return outputs

    size = min(max_batch, len(probes.images))
    alone = probes
    in_batches = probes
    if not thorough and size > 1:
        alone = probes.select(slice(1))
        in_batches = probes.select(slice(1, None))

    replays = {1: replay(alone, timed_run, batch=1)}
    if size > 1:
        replays[size] = replay(in_batches, timed_run, batch=size)

    if isinstance(runtime, OverlappingRuntime):
        replay_overlapping(probes, runtime, max_batch)

    return replays


def replay_overlapping(probes: Probes, runtime: OverlappingRuntime, max_batch: int) -> None:
    """Replay *probes* beside another batch in flight that began before them, then beside a later one.

    This detects, before the first request, batches that overwrite each other's memory. Raises
    `ParityError`.
    """

    # The other batch has inverted images, so that the outputs differ.
    def run_after_other(images: NDArray[np.uint8]) -> Outputs:
        wait_for_other = runtime.begin(list(~images))
        wait = runtime.begin(list(images))
        wait_for_other()
        return wait()

    def run_before_other(images: NDArray[np.uint8]) -> Outputs:
        # The other batch has a single image, so that an engine uses its other profile, too.
        wait = runtime.begin(list(images))
        wait_for_other = runtime.begin(list(~images[:1]))
        outputs = wait()
        wait_for_other()
        return outputs

    replay(probes, run_after_other, batch=max_batch)
    replay(probes, run_before_other, batch=max_batch)


def largest_batch(runtime: Runtime, settings: Settings) -> int:
    """Return how many images the server may put into one batch of *runtime*."""
    default = LARGEST_ON_CPU if runtime.device == "cpu" else runtime.largest_batch
    return min(settings.max_batch or default, runtime.largest_batch)
