"""Measure which of several runtimes runs a bundle fastest on this machine, and store the result.

The result is a JSON file beside the bundle or in `engine_cache`. It is valid for one bundle, processor,
number of threads and set of versions.
"""

import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.probes import read_probes, replay
from sopdeploy.environment import installed, processor, usable_cores
from sopdeploy.errors import ParityError, RuntimeUnavailableError
from sopdeploy.files import atomic_write
from sopdeploy_service.runtime.base import Runtime, must_run
from sopdeploy_service.settings import Settings

_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "openvino")
ROUNDS = 20
_BUDGET_SECONDS = 5.0
CLEARLY_FASTER = 0.95  # of the time of the first runtime

log = logging.getLogger("sopdeploy.service")


def fastest(
    bundle: Bundle, settings: Settings, runtimes: Mapping[str, Callable[[], Runtime]]
) -> tuple[str, str]:
    """Return the name of the runtime that runs single images of *bundle* fastest, and the measured times.

    *runtimes* maps names to functions that open a runtime. The first one is taken unless another one is
    clearly faster and its outputs agree with the probes. The measurement takes at most about five seconds.
    """
    path = _stored_in(bundle, settings)
    conditions = {
        "bundle": bundle.manifest.id,
        "processor": processor(),
        "threads": settings.threads or usable_cores(),
        "versions": installed(_PACKAGES),
    }
    try:
        stored = json.loads(path.read_bytes())
        milliseconds = stored["milliseconds"] if stored["conditions"] == conditions else None
    except (OSError, ValueError, KeyError, TypeError):
        milliseconds = None
    if milliseconds is None:
        milliseconds = time_runtimes(bundle, runtimes)
        text = json.dumps({"conditions": conditions, "milliseconds": milliseconds}, indent=2) + "\n"
        try:
            with atomic_write(path, shared=True) as partial:
                partial.write_text(text, encoding="utf-8")
        except OSError as error:
            log.info("%s: cannot be written (%s), so every start measures again", path, error.strerror)
    first = next(iter(runtimes))
    best = min(milliseconds, key=lambda name: float(milliseconds[name]))
    chosen = best if milliseconds[best] <= CLEARLY_FASTER * milliseconds.get(first, float("inf")) else first
    times = ", ".join(f"{name} {value:.2f} ms" for name, value in milliseconds.items())
    return chosen, f"{times} per image"


def time_runtimes(bundle: Bundle, runtimes: Mapping[str, Callable[[], Runtime]]) -> dict[str, float]:
    """Measure the median milliseconds of a single image of *bundle* in each of *runtimes*, alternately.

    Runtimes after the first one that cannot run the bundle or deviate from its probes are left out.
    """
    probes, first = read_probes(bundle.probes), next(iter(runtimes))
    image, opened = probes.images[:1], dict[str, Runtime]()
    with ExitStack() as stack:
        for name, open_runtime in runtimes.items():
            try:
                opened[name] = open_runtime()
                stack.callback(opened[name].close)
                with must_run(opened[name]):
                    replay(probes, opened[name].run)
            except (ParityError, RuntimeUnavailableError) as error:
                if name == first:
                    raise
                opened.pop(name, None)
                log.warning("%s: runtime %s is not used: %s", bundle.name, name, error)
        seconds: dict[str, list[float]] = {name: [] for name in opened}
        end = time.monotonic() + _BUDGET_SECONDS
        for _ in range(ROUNDS):
            for name, runtime in opened.items():
                started = time.perf_counter()
                runtime.run(image)
                seconds[name].append(time.perf_counter() - started)
            if time.monotonic() > end:
                break
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def _stored_in(bundle: Bundle, settings: Settings) -> Path:
    folder = settings.engine_cache or bundle.path.resolve().parent
    return folder / f".{bundle.name}.runtimes.json"
