"""Run a diagnosis: prepare images, load the server, and judge the measurements."""

import asyncio
import io
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from sopdeploy.client import AsyncClient, ModelInfo
from sopdeploy.client.requests import encode_image
from sopdeploy.config import StrictModel
from sopdeploy.data.folders import is_image, walk
from sopdeploy.doctor.advice import Advice, judge
from sopdeploy.doctor.measure import LoadStep, ServerLoad
from sopdeploy.errors import ConfigError, DataError, ServiceError
from sopdeploy.images.limits import SUFFIXES

MAX_FILES = 32
GENERATED_IMAGES = 4
IMAGE_SIZE = (640, 480)
REQUEST_TIMEOUT = 30.0  # seconds


class Diagnosis(StrictModel):
    """Measurements per number of clients, the *best* of them and the *advice*.

    `stopped` is the error that ended the load early, if any.
    """

    url: str
    model: str
    device: str
    steps: tuple[LoadStep, ...]
    best: LoadStep
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
    """Load the server at *url* for about *seconds* with up to *concurrency* clients and diagnose it.

    Raises `ServiceError` if the server is unreachable, rejects an image or completes no request under load,
    `DataError` if the folder *images* has no image, and `ConfigError` if *model* is required or unknown.
    """
    bodies = load_images(images)

    async def run() -> Diagnosis:
        async with AsyncClient(
            url, api_key=api_key, retries=0, timeout=REQUEST_TIMEOUT, max_connections=concurrency + 1
        ) as client:
            info = await client.info()
            chosen = _choose_model(info.models, model)
            for body in bodies:  # reports a bad image before the load, and warms up the runtime
                await client.classify(body, model=chosen.name)
            load = ServerLoad(client, bodies, chosen.name)
            steps = await load.run(concurrency, seconds)
        completed = [step for step in steps if step.answered]
        if not completed:
            reason = load.stopped or "every request was rejected"
            message = f"{url}: no request was completed under load ({reason})"
            raise ServiceError(message, code="nothing_answered", status=0)
        best = max(completed, key=lambda step: step.rate)
        return Diagnosis(
            url=url,
            model=chosen.name,
            device=f"{chosen.runtime} on {chosen.device}",
            steps=tuple(steps),
            best=best,
            advice=judge(best, completed),
            notes=tuple(_notes(url, len(info.models))),
            stopped=load.stopped,
        )

    return asyncio.run(run())


def load_images(folder: Path | None) -> list[bytes]:
    """Read up to 32 image files below *folder*, or generate JPEGs; raise `DataError` for an empty folder."""
    if folder is not None:
        paths = [path for path in walk(folder) if is_image(path.name)]
        if not paths:
            raise DataError(f"{folder}: contains no image ({', '.join(SUFFIXES)}); choose another folder")
        return [encode_image(path) for path in paths[:MAX_FILES]]
    images = []
    width, height = IMAGE_SIZE
    for seed in range(GENERATED_IMAGES):  # with detail like a photograph, so that file sizes are realistic
        rng = np.random.default_rng(seed)
        coarse = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(IMAGE_SIZE, Image.Resampling.BICUBIC))
        grain = rng.integers(-8, 9, smooth.shape, dtype=np.int16)
        file = io.BytesIO()
        pixels = (smooth.astype(np.int16) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", quality=88)
        images.append(file.getvalue())
    return images


def _choose_model(models: tuple[ModelInfo, ...], name: str | None) -> ModelInfo:
    chosen = [model for model in models if name in {None, model.name}]
    if len(chosen) != 1:
        names = ", ".join(model.name for model in models) or "none"
        raise ConfigError(f"choose one of the server's models ({names})", setting="model", value=name)
    return chosen[0]


def _notes(url: str, models: int) -> list[str]:
    """List conditions that distort the measurements."""
    notes = []
    if urlsplit(url).hostname in {"localhost", "127.0.0.1", "::1"}:
        notes.append("client and server share this machine and slow each other down; use another machine")
    if models > 1:
        notes.append("the server has several models; stage times include all of them")
    return notes
