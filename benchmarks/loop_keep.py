"""The part `keep` of `loop.py`: what keeping photographs costs a server, and whether its limit holds.

Two servers get the same load alternately: one keeps photographs, the other does not. There are more
photographs than the folder has room for, so that a photograph is new again when it returns.
With the simulated engine, every photograph is uncertain; with a bundle, its predictions decide.
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
from pathlib import Path

import httpx
from load import Load, put_load
from measure import Result
from serving_alone import write_images
from serving_peers import OURS, free_port, started

HERE = Path(__file__).resolve().parent
ENGINE = "20,10"  # ms per batch and per image
LARGEST = 8
LIMIT = 8_000_000  # bytes of the folder, 140 of the photographs
PHOTOS = 400
CONNECTIONS = 16
WATCH_SECONDS = 0.01


def folder_bytes(folder: Path) -> int:
    """Sum up the blocks of 4 KiB of the files in *folder*, which may change meanwhile."""
    total = 0
    for file in folder.iterdir():
        try:
            total += -(-file.stat().st_size // 4096) * 4096
        except FileNotFoundError:  # renamed or deleted
            continue
    return total


def cpu_seconds(process: int) -> float:
    """Read the processor time of *process* and its threads."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def put_load_on(
    folder: Path, kept: Path | None, arguments: argparse.Namespace
) -> tuple[Load, float, int, float]:
    """Put load on a new server.

    Returns the client's figures, the server's processor time per image in ms, the largest size of *kept*, and
    the number of photographs kept.
    """
    port, largest, ended = free_port(), 0, threading.Event()
    command = [sys.executable, str(HERE / "serving_ours.py"), "--port", str(port), "--largest", str(LARGEST)]
    command += ["--fake", ENGINE] if arguments.bundle is None else ["--bundle", str(arguments.bundle)]
    if kept is not None:
        command += ["--keep", str(kept), "--keep-bytes", str(LIMIT)]

    def watch() -> None:
        nonlocal largest
        while kept is not None and not ended.wait(WATCH_SECONDS):
            largest = max(largest, folder_bytes(kept))

    with started(command, OURS, port, {}, HERE) as process:
        watcher = threading.Thread(target=watch)
        watcher.start()
        url = f"http://127.0.0.1:{port}"
        before = cpu_seconds(process)
        load = put_load(f"{url}/v1/classify", folder, arguments.seconds, "--connections", CONNECTIONS)
        used = 1000 * (cpu_seconds(process) - before) / (load.answered * (1 + 1 / arguments.seconds))
        ended.set()
        watcher.join()
        lines = httpx.get(f"{url}/metrics").text.splitlines()
    start = 'sopdeploy_kept_images_total{result="kept"} '
    return (
        load,
        used,
        largest,
        sum(float(line.removeprefix(start)) for line in lines if line.startswith(start)),
    )


def measure(arguments: argparse.Namespace) -> list[Result]:
    """Measure throughput and p99 with and without `keep`, and the largest size of the folder."""
    sides: dict[bool, list[Load]] = {True: [], False: []}
    used: dict[bool, list[float]] = {True: [], False: []}
    largest, kept_photos = 0, 0.0
    with tempfile.TemporaryDirectory() as temporary:
        (folder := Path(temporary, "photos")).mkdir()
        write_images(folder, PHOTOS)
        (kept := Path(temporary, "kept")).mkdir()
        for number in range(arguments.rounds):
            for keeps in (True, False) if number % 2 else (False, True):
                load, cpu, size, photos = put_load_on(folder, kept if keeps else None, arguments)
                sides[keeps].append(load)
                used[keeps].append(cpu)
                largest, kept_photos = max(largest, size), kept_photos + photos
                print(f"keep {keeps}: {load}, {cpu:.2f} ms per image", file=sys.stderr)
    results = [
        Result(
            case=what,
            against="no keep",
            ours=statistics.median(getattr(load, key) for load in sides[True]),
            other=statistics.median(getattr(load, key) for load in sides[False]),
            unit=unit,
            runs=arguments.rounds,
        )
        for what, key, unit in (("throughput", "images_per_s", "images/s"), ("p99", "p99_ms", "ms"))
    ]
    seconds = arguments.rounds * arguments.seconds
    return [
        *results,
        Result(
            case="processor time per image",
            against="no keep",
            ours=statistics.median(used[True]),
            other=statistics.median(used[False]),
            unit="ms",
            runs=arguments.rounds,
        ),
        Result(case="photographs kept", ours=kept_photos / seconds, unit="1/s", runs=arguments.rounds),
        Result(case="largest folder", against="limit", ours=largest, other=LIMIT, unit="bytes", runs=1),
    ]
