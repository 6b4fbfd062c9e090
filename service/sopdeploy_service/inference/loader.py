"""From the path of a bundle to a runtime that was seen to give the right numbers.

`verify`, `predict` and the server all come through here, so none of them works with a network that
this machine computes wrongly.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.folder import Bundle, open_bundle
from sopdeploy.bundle.manifest import Manifest
from sopdeploy.bundle.probes import Outputs, Probes, Replay, Run, read_probes, replay
from sopdeploy.bundle.signing import check_signed, signature_path
from sopdeploy.errors import BundleError, RuntimeUnavailableError
from sopdeploy_service.images.fast_decode import FastDecode, checked
from sopdeploy_service.runtime.base import Overlapping, Runtime
from sopdeploy_service.runtime.selection import choose
from sopdeploy_service.settings import Settings


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


FEW = 2  # probes replayed alone at a start: a CUDA graph captures the first and answers the second
LARGEST_ON_CPU = 4  # more gains nothing on a CPU and makes the first image of a batch wait


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A bundle, a runtime for it, its replays by batch size, and (images, seconds) of each run.

    *fast_decode* says what that way of decoding changes, None where decoding is exact; *seconds* how long
    each step of opening it took.
    """

    bundle: Bundle
    runtime: Runtime
    replays: dict[int, Replay]
    timings: tuple[tuple[int, float], ...] = ()
    fast_decode: FastDecode | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


def load_model(path: Path, settings: Settings, *, thorough: bool = False) -> LoadedModel:
    """Open the bundle at *path*, choose a runtime and replay the probes through it.

    Every probe runs in a batch of the largest size; alone only `FEW` do, each of them where *thorough*,
    because a server that starts on a CPU waits for little else.

    Raises `BundleError`, `RuntimeUnavailableError` or `ParityError`, `ConfigError` for a key that is none,
    and what `fast_decode.checked` does.
    """
    moments = [time.monotonic()]
    bundle = open_bundle(path)
    if settings.verify_key is not None:
        check_signed(bundle.manifest, signature_path(path), settings.verify_key)
    moments.append(time.monotonic())
    smallest = bundle.manifest.batch.minimum
    if smallest > 1:
        raise RuntimeUnavailableError(
            f"{path}: was verified for batches of {smallest} and more, a single image is one; "
            "export it with a smallest batch of 1"
        )
    runtime = choose(bundle, settings)
    moments.append(time.monotonic())
    timed = Timed(runtime)
    largest = largest_batch(runtime, settings)
    probes = proving_probes(bundle)
    replays = replay_all(probes, timed, largest, thorough=thorough)
    if isinstance(runtime, Overlapping):
        replay_overlapping(probes, runtime, largest)
    moments.append(time.monotonic())
    drift = checked(bundle, runtime, settings)
    moments.append(time.monotonic())
    steps = ("hashes", "session", "probes", "fast_decode")[: 3 if drift is None else 4]
    spent = (after - before for before, after in pairwise(moments))
    return LoadedModel(
        bundle=bundle,
        runtime=runtime,
        replays=replays,
        timings=tuple(timed.timings),
        fast_decode=drift,
        seconds=dict(zip(steps, spent, strict=False)),
    )


class Timed:
    """A runtime's `run` that keeps (images, seconds) of every call."""

    def __init__(self, runtime: Runtime) -> None:
        self.timings: list[tuple[int, float]] = []
        self._runtime = runtime

    def __call__(self, images: NDArray[np.uint8]) -> Mapping[str, NDArray[np.float32]]:
        """Run *images*."""
        started = time.monotonic()
        outputs = self._runtime.run(images)
        self.timings.append((len(images), time.monotonic() - started))
        return outputs


def proving_probes(bundle: Bundle) -> Probes:
    """Return the probes of *bundle*; raises `BundleError` for some that would prove nothing."""
    probes = read_probes(bundle.probes)
    if not fit(probes, bundle.manifest):
        raise BundleError(
            f"{bundle.probes}: does not probe every output; nothing would be proved: export the bundle again"
        )
    return probes


def replay_all(probes: Probes, run: Run, largest: int, *, thorough: bool) -> dict[int, Replay]:
    """Replay *probes* one by one, and in batches of *largest* where there are so many.

    Unless *thorough*, of larger batches and single images the latter are the first `FEW` only.

    Raises `ParityError` for other numbers.
    """
    sizes = {1, min(largest, len(probes.images))}
    few = probes if thorough or len(sizes) == 1 else first(probes, FEW)
    return {size: replay(few if size == 1 else probes, run, batch=size) for size in sorted(sizes)}


def first(probes: Probes, count: int) -> Probes:
    """Return the first *count* of *probes*."""
    expected = {name: values[:count] for name, values in probes.expected.items()}
    return replace(probes, images=probes.images[:count], expected=expected)


def fit(probes: Probes, manifest: Manifest) -> bool:
    """Say whether there are probes, of the input's shape, with numbers of its shape for every output."""
    count = len(probes.images)
    found = {name: values.shape for name, values in probes.expected.items()}
    wanted = {output.name: (count, *output.shape[1:]) for output in manifest.outputs}
    return count > 0 and probes.images.shape[1:] == manifest.image_shape and wanted.items() <= found.items()


def largest_batch(runtime: Runtime, settings: Settings) -> int:
    """Return how many images the server may put into one batch of *runtime*."""
    wanted = settings.max_batch
    if wanted is None:
        wanted = LARGEST_ON_CPU if runtime.device == "cpu" else runtime.largest_batch
    return min(wanted, runtime.largest_batch)
