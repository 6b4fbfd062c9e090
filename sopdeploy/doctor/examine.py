"""An examination from the first question to the diagnosis."""

import asyncio
import io
import ipaddress
import os
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from sopdeploy.client import AsyncClient, ModelInfo
from sopdeploy.client.images import read_file
from sopdeploy.config import StrictModel
from sopdeploy.doctor.advice import Advice, judge
from sopdeploy.doctor.measure import Load, Measured, bare_ratio, ramp_to
from sopdeploy.errors import ConfigError, DataError, ServiceError

KINDS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}
MOST_FILES = 32
MADE = 4
SIDES = (640, 480)


def pictures(folder: Path | None) -> list[bytes]:
    """Return the bytes of the first pictures below *folder*, or of made JPEGs; raises `DataError`."""
    if folder is None:
        return [made(seed) for seed in range(MADE)]
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in KINDS)[:MOST_FILES]
    if not found:
        raise DataError(f"{folder}: no picture here ({', '.join(sorted(KINDS))})")
    return [read_file(path) for path in found]


def made(seed: int) -> bytes:
    """Return a JPEG with the detail of a photograph, as its size in bytes depends on that."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (SIDES[1] // 16, SIDES[0] // 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(SIDES, Image.Resampling.BICUBIC)).astype(np.int16)
    grain = rng.integers(-8, 9, smooth.shape, dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
    return file.getvalue()


TIMEOUT_SECONDS = 30.0


class Diagnosis(StrictModel):
    """What was found: every step, the *best* of them, and what limits that one.

    `bare_ratio` is the best rate over that of the engine alone. `stopped` is the error that ended the load
    early, if any.
    """

    url: str
    model: str
    device: str
    largest_batch: int
    steps: tuple[Measured, ...]
    best: Measured
    bare_ratio: float
    advice: Advice
    notes: tuple[str, ...]
    stopped: str | None


def examine(
    url: str,
    *,
    images: Path | None = None,
    seconds: float = 20.0,
    concurrency: int = 32,
    model: str | None = None,
    api_key: str | None = None,
) -> Diagnosis:
    """Ask the server at *url*, up to *concurrency* requests at once for about *seconds*; say what limits it.

    Raises `ServiceError` where it cannot be reached, refuses a picture or answers nothing under load;
    `DataError` where *images* holds none, and `ConfigError` where *model* is needed or not there.
    """
    return asyncio.run(examination(url, pictures(images), seconds, concurrency, model, api_key))


async def examination(
    url: str, bodies: list[bytes], seconds: float, concurrency: int, model: str | None, api_key: str | None
) -> Diagnosis:
    """Return the diagnosis of the server at *url*, asked with *bodies*."""
    async with AsyncClient(
        url, api_key=api_key, retries=0, timeout=TIMEOUT_SECONDS, connections=concurrency + 1
    ) as client:
        info = await client.info()
        chosen = choose(info.models, model)
        for body in bodies:  # each alone: a bad picture is told before the load, and the engine is warm
            await client.classify(body, model=chosen.name)
        load = Load(client, bodies, chosen.name)
        steps = await load.run(ramp_to(concurrency), seconds)
    answered = [step for step in steps if step.answered]
    if not answered:
        raise ServiceError(
            f"{url}: nothing was answered under load ({load.stopped or 'everything was refused'})",
            code="nothing_answered",
            status=0,
        )
    best = max(answered, key=lambda step: step.rate)
    cores = len(os.sched_getaffinity(0)) if is_here(url) else None
    return Diagnosis(
        url=url,
        model=chosen.name,
        device=f"{chosen.runtime} on {chosen.device}",
        largest_batch=chosen.largest_batch,
        steps=tuple(steps),
        best=best,
        bare_ratio=bare_ratio(best, answered),
        advice=judge(best, answered, largest_batch=chosen.largest_batch, cores=cores),
        notes=tuple(notes(url, best, len(info.models))),
        stopped=load.stopped,
    )


def choose(models: tuple[ModelInfo, ...], name: str | None) -> ModelInfo:
    """Return the model that *name* means, or the only one; raises `ConfigError`."""
    found = [model for model in models if name in {None, model.name}]
    if len(found) != 1:
        names = ", ".join(model.name for model in models) or "none"
        raise ConfigError(f"--model: say which of the server's models to ask ({names})")
    return found[0]


def notes(url: str, best: Measured, models: int) -> list[str]:
    """Return what a reader should know before believing the numbers."""
    found = []
    if is_here(url):
        found.append(
            "client and server share this machine and take time from each other; ask from another one"
        )
        load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
        if load > cores:
            found.append(
                f"this machine has more to do (load {load:.1f}) than cores ({cores}): all stages wait"
            )
    others = best.mean_batch * best.batches - best.answered
    if others > 0.1 * best.answered + best.concurrency:
        found.append(
            f"about {others:.0f} of the images in the best step were somebody else's; they count too"
        )
    if models > 1:
        found.append("several models answer here; the times of stages are those of all of them")
    return found


def is_here(url: str) -> bool:
    """Say whether *url* leads to this machine by its loopback address."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
