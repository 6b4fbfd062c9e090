"""`sopdeploy classify` compared with the bare engine; memory, interruptions and damaged files.

    python benchmarks/classify.py --quick
    python benchmarks/classify.py --images cifar10/train --bundle BUNDLE --json

- Throughput: images per second between the first and the last batch, from files and from a tar archive,
  against the runtime alone on full batches, measured before and after. Other load makes this inexact. The
  `simulated` engine sleeps 20 + 2 n ms for n images, as an accelerator would; the `real` one is ONNX Runtime
  on one core with --bundle, while another process decodes. `command` includes listing, start of the decoder
  and report. `time in the engine` is the fraction of the time in which the runtime runs, `CPU of the engine`
  its fraction of the CPU time of its thread, which other load affects least.
- Memory: the largest sum over the processes of the command, for a tenth of the images and for all.
- Kills: the number of rows that differ from those of an uninterrupted run after SIGKILL at ten random
  moments.
- Damaged: the number of wrong rows if every hundredth file is cut.

Without --images, the program generates JPEGs of 32 pixels.
"""

import argparse
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
from fake_runtime import FakeRuntime
from measure import Result, existing, make_parser, one_line_errors, report
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.errors import DataError
from sopdeploy_service.commands.batch import run
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.runtime.base import Runtime
from sopdeploy_service.settings import Settings

BATCH = {"simulated": 32, "real": 16}
BARE_SECONDS = 4.0
KILLS = 10
CUT = 100  # one file in this many is damaged
PART = ("--part-images", "1024")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=existing, help="folder of images, such as CIFAR-10 as JPEGs")
    parser.add_argument("--bundle", type=existing, required=True, help="bundle of the real engine")
    parser.add_argument("--count", type=int, help="images; default 20,000, 2,000 with --quick")
    parser.add_argument("--only", choices=("throughput", "memory", "kills", "damaged"))
    parser.add_argument("--quick", action="store_true", help="fewer images")
    return parser.parse_args()


def collect_images(source: Path | None, folder: Path, count: int) -> Path:
    """Link to *count* images of *source*, or generate them, in *folder*, in ten subfolders."""
    files = sorted(source.rglob("*.jp*g")) if source else []
    if source and len(files) < count:
        raise DataError(f"{source}: has {len(files)} JPEG files, fewer than --count {count}")
    files = files[:: max(1, len(files) // count)]
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number % 10}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if source:
            path.symlink_to(files[number].resolve())
        else:
            coarse = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
            coarse.resize((32, 32), Image.Resampling.BICUBIC).save(path, quality=90)
    return folder


def bare(runtime: Runtime, batch: int, side: int) -> float:
    """Measure the images per second of *runtime* on full batches."""
    images = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    runtime.run(images)
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < BARE_SECONDS:
        runtime.run(images)
        done += batch
    return done / (time.perf_counter() - started)


def throughput(name: str, loaded: LoadedModel, source: Path, scratch: Path, kind: str) -> list[Result]:
    """Compare a run on *source* with the runtime alone, which is measured before and after the run."""
    batch, side = BATCH[name], loaded.bundle.manifest.preprocess.crop
    shutil.rmtree(scratch, ignore_errors=True)
    times: list[NDArray[np.float64]] = []  # images, clock, time in the runtime, CPU of thread, of runtime
    engine: Any = loaded.runtime

    def on_progress(done: int, _errors: int, _total: int) -> None:
        clocks = (time.perf_counter(), engine.seconds, time.thread_time(), engine.cpu)
        times.append(np.array([done, *clocks]))

    alone = [bare(loaded.runtime, batch, side)]
    started = time.perf_counter()
    with patch.object(run, "load_model", return_value=loaded):
        classified = run.classify(
            loaded.bundle.path,
            [str(source)],
            scratch,
            workers=1,
            threads=1,
            max_batch=batch,
            on_progress=on_progress,
        )
    whole = classified.num_images / (time.perf_counter() - started)
    alone.append(bare(loaded.runtime, batch, side))
    images, seconds, busy, cpu, engine_cpu = (times[-1] - times[0]).tolist()
    case, other = f"{name} engine, {kind}", statistics.mean(alone)
    facts: dict[str, Any] = {"against": "bare engine", "other": other, "unit": "images/s", "runs": 1}
    results = [
        Result(case=case, ours=images / seconds, **facts),
        Result(case=f"{case}, command", ours=whole, **facts),
        Result(
            case=f"{case}, time in the engine", against="all time", ours=busy, other=seconds, unit="s", runs=1
        ),
    ]
    if name == "real":
        against = "CPU of its thread"
        results.append(
            Result(
                case=f"{case}, CPU of the engine",
                against=against,
                ours=engine_cpu,
                other=cpu,
                unit="cpu-s",
                runs=1,
            )
        )
    return results


class Timed:
    """Wraps a runtime: measures its seconds and CPU seconds, and keeps it open when a run closes it."""

    def __init__(self, runtime: Any) -> None:
        self.name, self.device, self.largest_batch = runtime.name, runtime.device, runtime.largest_batch
        self._run, self.seconds, self.cpu = runtime.run, 0.0, 0.0

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Run a batch."""
        started, cpu = time.perf_counter(), time.thread_time()
        outputs: dict[str, NDArray[np.float32]] = self._run(images)
        self.seconds += time.perf_counter() - started
        self.cpu += time.thread_time() - cpu
        return outputs

    def close(self) -> None:
        """Do nothing, because the next measurement uses the runtime again."""


def measure_throughput(bundle: Path, images: Path, scratch: Path) -> list[Result]:
    """Measure the simulated and the real engine on files and on a tar archive."""
    archive = images.with_suffix(".tar")
    with tarfile.open(archive, "w", dereference=True) as tar:
        tar.add(images, "images")
    opened = open_bundle(bundle)
    fake = FakeRuntime(num_classes=len(opened.labels), fixed_ms=20, per_image_ms=2, largest_batch=32)
    real = load_model(bundle, Settings(threads=1, max_batch=BATCH["real"])).runtime
    results = []
    for name, runtime in (("simulated", fake), ("real", real)):
        loaded = LoadedModel(bundle=opened, runtime=Timed(runtime), replays={})
        for source, kind in ((images, "files"), (archive, "tar")):
            results += throughput(name, loaded, source, scratch / "throughput", kind)
    return results


def command(bundle: Path, source: Path, out: Path) -> subprocess.Popen[bytes]:
    """Start `sopdeploy classify` with one thread and one decoder process."""
    settings = [f"--setting=max_batch={BATCH['real']}", "--setting=threads=1"]
    options = ["--workers", "1", *settings, "--json", *PART]
    words = [sys.executable, "-m", "sopdeploy", "classify", str(bundle), str(source), "--out", str(out)]
    return subprocess.Popen([*words, *options], stdout=subprocess.DEVNULL)


def finish(child: subprocess.Popen[bytes]) -> None:
    """Wait for *child*; raises `RuntimeError` if it fails."""
    if child.wait():
        raise RuntimeError(f"{child.args!r}: exit code {child.returncode}")


def family(process: int) -> list[int]:
    """List *process* and its children."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *map(int, children)]


def peak_mib(child: subprocess.Popen[bytes]) -> float:
    """Wait for *child*; return the largest memory of its processes in MiB, shared pages counted once."""
    peak = 0
    while child.poll() is None:
        try:
            pages = [Path(f"/proc/{process}/smaps_rollup").read_text() for process in family(child.pid)]
            peak = max(peak, sum(int(page.partition("\nPss:")[2].split()[0]) for page in pages))
        except (OSError, IndexError):
            pass  # a process has just ended
        time.sleep(0.1)
    finish(child)
    return peak / 2**10


def rows(out: Path) -> dict[str, dict[str, Any]]:
    """Read the rows of a run by the name of the image."""
    files = sorted((out / "rows").glob("*.parquet"))
    listed = [row for file in files for row in pq.read_table(file).to_pylist()]
    by_name = {Path(row.pop("path")).name: row for row in listed}
    if len(by_name) < len(listed):
        raise RuntimeError(f"{out}: an image has two rows")
    return by_name


def measure_memory(bundle: Path, images: Path, scratch: Path, count: int) -> list[Result]:
    """Compare the memory for all images with that for a tenth."""
    few = collect_images(images, scratch / "few", count // 10)
    peaks = [peak_mib(command(bundle, source, scratch / f"m-{source.name}")) for source in (few, images)]
    case, against = f"memory, {count} images", f"{count // 10} images"
    return [Result(case=case, against=against, ours=peaks[1], other=peaks[0], unit="MiB", runs=1)]


def measure_kills(bundle: Path, images: Path, scratch: Path) -> list[Result]:
    """Count the rows that differ after `KILLS` kills."""
    started = time.perf_counter()
    finish(command(bundle, images, scratch / "whole"))
    seconds, rng = time.perf_counter() - started, random.Random(0)  # noqa: S311 - moments of kills
    for _ in range(KILLS):
        child = command(bundle, images, scratch / "killed")
        time.sleep(rng.uniform(0.1, 0.5) * seconds)
        child.send_signal(signal.SIGKILL)
        child.wait()
    finish(command(bundle, images, scratch / "killed"))
    expected, actual = rows(scratch / "whole"), rows(scratch / "killed")
    wrong = sum(expected.get(name) != actual.get(name) for name in expected.keys() | actual.keys())
    return [Result(case=f"rows that differ after {KILLS} kills", ours=wrong, unit="rows", runs=len(expected))]


def measure_damaged(bundle: Path, images: Path, scratch: Path, count: int) -> list[Result]:
    """Cut every `CUT`th file; count damaged files without an error and other files with different rows."""
    damaged = collect_images(images, scratch / "damaged", count)
    names = set()
    for file in sorted(damaged.rglob("*.jpg"))[::CUT]:
        content = file.read_bytes()
        file.unlink()  # it may be a link
        file.write_bytes(content[: len(content) // 3])
        names.add(file.name)
    good = scratch / "good"
    finish(command(bundle, collect_images(images, scratch / "copied", count), good))
    finish(command(bundle, damaged, scratch / "bad"))
    expected, actual = rows(good), rows(scratch / "bad")
    wrong = sum(
        (row["error"] is None or row["classes"] is not None) if name in names else row != expected[name]
        for name, row in actual.items()
    )
    return [Result(case=f"wrong rows with {len(names)} damaged files", ours=wrong, unit="rows", runs=count)]


def main() -> None:
    """Run from the command line."""
    given = arguments()
    count = given.count or (2000 if given.quick else 20_000)
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        open_bundle(given.bundle)
        scratch = Path(folder)
        images = collect_images(given.images, scratch / "images", count)
        parts: dict[str, Callable[[], list[Result]]] = {
            "throughput": lambda: measure_throughput(given.bundle, images, scratch),
            "memory": lambda: measure_memory(given.bundle, images, scratch, count),
            "kills": lambda: measure_kills(given.bundle, images, scratch),
            "damaged": lambda: measure_damaged(given.bundle, images, scratch, count),
        }
        results = []
        for name, measure in parts.items():
            if given.only in (None, name):
                results += measure()
        report(results, as_json=given.json)


if __name__ == "__main__":
    main()
