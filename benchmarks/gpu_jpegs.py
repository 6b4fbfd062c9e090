"""The stages `decoding` and `http` of `gpu_check.py`: JPEGs per second, decoded on cores or on the GPU."""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np
from load import Load, put_load
from serving_alone import write_images

from sopdeploy.bundle.folder import Bundle
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy.images.pixels import resized_size
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.images.decode import EncodedImage
from sopdeploy_service.images.loaders import make_decoder, synthetic_jpeg
from sopdeploy_service.images.nvimagecodec import JpegJob, NvImageCodec
from sopdeploy_service.runtime.onnxruntime import import_onnxruntime, pinned_memory
from sopdeploy_service.settings import LARGEST_DECODE_BATCH, Settings, decoders_per_process

SIZES = ((500, 375), (4000, 3000))
WAYS: tuple[str, ...] = ("exact", "nvimagecodec")
CLIENTS = 4  # processes that put load on the server
CONNECTIONS = 64  # of each


def decoding_table(ways: tuple[str, ...] = WAYS, seconds: float = 3.0) -> dict[str, Any]:
    """Measure images/s of one process that only decodes; rounds alternate between the ways."""
    cores = os.cpu_count() or 1
    sides = [
        (way, threads) for way in ways for threads in ((cores,) if way == "exact" else (1, waiting(cores)))
    ]
    rows = []
    for size in SIZES:
        body = synthetic_jpeg(size, 0)
        rounds = [
            [decoded_per_second(way, threads, body, seconds) for way, threads in sides] for _ in range(3)
        ]
        medians = [round(statistics.median(side)) for side in zip(*rounds, strict=True)]
        rows.append(["{} x {}".format(*size), *medians])
    columns = ["JPEG", *(f"{way}, {threads} threads" for way, threads in sides)]
    text = (
        "Images/s of one process, medians of 3 rounds. One thread decodes alone, more form batches on a GPU."
    )
    return {"title": "Decoding", "text": text, "columns": columns, "rows": rows}


def copies_table(loader: NvImageCodec, device: str = "cuda", runs: int = 50) -> dict[str, Any]:
    """Measure what each step of the pixels costs per image: decoded and resized on *device*, and copied.

    Decision 11 says when the copies would be worth avoiding.
    """
    jpegs = [synthetic_jpeg(SIZES[0], seed) for seed in range(LARGEST_DECODE_BATCH)]
    rules, value = Preprocess(), import_onnxruntime().OrtValue
    target = resized_size(SIZES[0], rules)
    memory = pinned_memory(import_onnxruntime()) if device == "cuda" else None
    resized = value.ortvalue_from_shape_and_type((target[1], target[0], 3), np.uint8, device)
    shape = (rules.crop, rules.crop, 3)
    host = value.ortvalue_from_shape_and_type(shape, np.uint8, memory_info=memory).numpy()
    images = value.ortvalue_from_shape_and_type(shape, np.uint8, device)

    def decode_and_resize() -> None:
        jobs = [JpegJob(jpeg, SIZES[0], target, rules.interpolation) for jpeg in jpegs]
        loader.resize(jobs, loader.decode(jpegs))
        if any(job.pixels is None for job in jobs):
            raise RuntimeUnavailableError("a JPEG was not decoded on the GPU")

    steps: dict[str, tuple[Callable[[], object], int]] = {
        "decode": (lambda: loader.decode(jpegs), len(jpegs)),
        "decode, resize and copy to the host": (decode_and_resize, len(jpegs)),
        "copy of the resized pixels to the host": (resized.numpy, 1),
        "copy of the cropped pixels to the GPU": (lambda: images.update_inplace(host), 1),
    }
    rows: list[list[object]] = []
    for name, (step, count) in steps.items():
        step()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(runs):
            step()
        spent = time.perf_counter() - wall, time.process_time() - cpu
        rows.append([name, *(round(1e6 * seconds / runs / count, 1) for seconds in spent)])
    text = f"Microseconds per image of 500 x 375 pixels, in batches of {LARGEST_DECODE_BATCH}, one thread."
    columns = ["step", "time", "CPU time"]
    return {"title": "Steps of decoding on the GPU", "text": text, "columns": columns, "rows": rows}


def waiting(cores: int) -> int:
    """Return the threads of a server on *cores* that decodes on a GPU."""
    return decoders_per_process(cores, 1) + 2 * LARGEST_DECODE_BATCH


def decoded_per_second(way: str, threads: int, body: bytes, seconds: float) -> float:
    """Decode *body* again and again in *threads*; return images per second."""
    decode, rules, image = make_decoder(Settings(), way), Preprocess(), EncodedImage(body)
    decode(image, rules)
    started = time.perf_counter()

    def work(_: int) -> int:
        count = 0
        while time.perf_counter() - started < seconds:
            decode(image, rules)
            count += 1
        return count

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(work, range(threads))) / (time.perf_counter() - started)


def http_table(bundle: Bundle, ways: tuple[str, ...] = WAYS, seconds: float = 10.0) -> dict[str, Any]:
    """Measure JPEGs/s over HTTP of a server with its automatic settings."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = write_images(Path(name))
        for way in ways:
            with served(bundle, way) as url, ThreadPoolExecutor(CLIENTS) as pool:
                options = ("--connections", CONNECTIONS)
                runs = [pool.submit(put_load, url, folder, seconds, *options) for _ in range(CLIENTS)]
                rows.append([way, *summary([run.result() for run in runs])])
    text = f"JPEGs of 500 x 375 pixels, {CLIENTS * CONNECTIONS} connections; clients run on the same cores."
    columns = ["decode", "images/s", "p50 ms", "p99 ms", "status codes"]
    return {"title": f"JPEGs over HTTP, {bundle.name}", "text": text, "columns": columns, "rows": rows}


def summary(loads: list[Load]) -> list[object]:
    """Add up the images of *loads*; the latencies are the largest."""
    codes = sorted({code for load in loads for code in load.codes})
    return [
        round(sum(load.images_per_s for load in loads)),
        round(max(load.p50_ms for load in loads), 1),
        round(max(load.p99_ms for load in loads), 1),
        " ".join(codes),
    ]


@contextmanager
def served(bundle: Bundle, way: str) -> Iterator[str]:
    """Serve *bundle* with front ends; yield the URL that classifies."""
    settings = {"decode": way, "queue_size": 4096}
    options = [f"--setting={name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "sopdeploy", "serve", str(bundle.path), "--port=0", "--front-ends=auto"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as server:
        try:
            for line in cast(TextIO, server.stdout):
                if line.startswith("ready: "):
                    yield f"{line.split()[1]}/v1/classify"
                    break
            else:
                raise RuntimeUnavailableError(f"the server with decode={way} did not start; the log says why")
        finally:
            server.send_signal(signal.SIGTERM)
