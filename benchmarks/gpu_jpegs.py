"""The stages `decoding` and `http` of `gpu_check.py`: JPEGs per second, decoded on cores or on the GPU."""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

from load import Load, put_load
from serving_alone import write_images

from sopdeploy.bundle.folder import Bundle
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.cores import LARGEST_DECODE_BATCH, decoders_per_process
from sopdeploy_service.images.decode import EncodedImage
from sopdeploy_service.images.loaders import make_decoder, synthetic_jpeg
from sopdeploy_service.settings import DecodeWay, Settings

SIZES = ((500, 375), (4000, 3000))
WAYS: tuple[DecodeWay, ...] = ("exact", "nvimagecodec")
CLIENTS = 4  # processes that put load on the server
CONNECTIONS = 64  # of each


def decoding_table(ways: tuple[DecodeWay, ...] = WAYS, seconds: float = 3.0) -> dict[str, Any]:
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


def waiting(cores: int) -> int:
    """Return the threads of a server on *cores* that decodes on a GPU."""
    return decoders_per_process(cores, 1) + 2 * LARGEST_DECODE_BATCH


def decoded_per_second(way: DecodeWay, threads: int, body: bytes, seconds: float) -> float:
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


def http_table(bundle: Bundle, ways: tuple[DecodeWay, ...] = WAYS, seconds: float = 10.0) -> dict[str, Any]:
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
def served(bundle: Bundle, way: DecodeWay) -> Iterator[str]:
    """Serve *bundle* with front ends; yield the URL that classifies."""
    settings = {"decode": way, "queue_size": 4096, "sandbox": "off"}
    options = [f"--set={name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "sopdeploy", "serve", str(bundle.path), "--port=0", "--front-ends=auto"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as server:
        try:
            for line in cast(TextIO, server.stdout):
                if line.startswith("ready: "):
                    yield f"{line.split()[1]}/v1/classify"
                    break
            else:
                raise RuntimeUnavailableError(f"the server with decode={way} did not start")
        finally:
            server.send_signal(signal.SIGTERM)
