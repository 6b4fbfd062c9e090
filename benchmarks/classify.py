"""`sopdeploy classify` from files, from a tar archive and with `--ray local`, compared with the bare runtime.

    python benchmarks/classify.py --images photos --bundle BUNDLE --count 2000

Every case is the whole command, with the list and the start of its processes and of Ray, with one decoder
process and one thread of the runtime. `cpu` is the processor time of all of its processes per image, which
other load affects least; `memory` is their largest sum, with shared pages counted once. The other side runs
random images in full batches in one process. The files of --images are repeated up to --count.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from measure import Result, existing, make_parser, one_line_errors, report

from sopdeploy.errors import DataError
from sopdeploy_service.inference.loader import largest_batch, load_model
from sopdeploy_service.settings import Settings

SAMPLE_SECONDS = 0.2  # what a process uses in its last moments is not counted
BARE_SECONDS = 10.0


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=existing, required=True, help="folder of JPEGs")
    parser.add_argument("--bundle", type=existing, required=True)
    parser.add_argument("--count", type=int, default=2000, help="images")
    return parser.parse_args()


def run_bare(bundle: Path) -> tuple[float, float]:
    """Return the images per second of the runtime alone, and its processor time per image in ms."""
    settings = Settings(threads=1)
    loaded = load_model(bundle, settings)
    batch, side = largest_batch(loaded.runtime, settings), loaded.bundle.manifest.preprocess.crop
    images = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    started, used, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < BARE_SECONDS:
        loaded.runtime.run(images)
        done += batch
    return done / (time.perf_counter() - started), 1000 * (time.process_time() - used) / done


def run_command(*words: str) -> tuple[float, float, float]:
    """Run a command; return its seconds, its processor seconds and its largest memory in MiB (Linux)."""
    started, used, peak = time.perf_counter(), dict[int, float](), 0.0
    with subprocess.Popen([sys.executable, "-m", "sopdeploy", *words], stdout=subprocess.DEVNULL) as child:
        while child.poll() is None:
            processes = descendants(child.pid)
            with suppress(OSError, IndexError):  # a process has just ended
                peak = max(peak, sum(map(memory, processes)))
            used |= {process: seconds for process in processes if (seconds := processor_seconds(process))}
            time.sleep(SAMPLE_SECONDS)
    if child.returncode:
        sys.exit(child.returncode)
    return time.perf_counter() - started, sum(used.values()), peak


def descendants(process: int) -> list[int]:
    """List *process* and the processes below it."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
    found = [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def processor_seconds(process: int) -> float:
    """Read the processor time that *process* has used; 0 if it has ended."""
    with suppress(OSError):
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def memory(process: int) -> float:
    """Read the memory of *process* in MiB, with its share of shared pages."""
    page = Path(f"/proc/{process}/smaps_rollup").read_text()
    return int(page.partition("\nPss:")[2].split()[0]) / 2**10


def main() -> None:
    """Measure and report."""
    given = arguments()
    files = sorted(
        path.absolute() for path in given.images.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg"}
    )
    if not files:
        raise DataError(f"{given.images}: no JPEG files")
    results = []
    with tempfile.TemporaryDirectory(prefix="r") as scratch:
        folder = Path(scratch)
        repeated = list(itertools.islice(itertools.cycle(files), given.count))
        listed, packed = folder / "images.txt", folder / "images.tar"
        listed.write_text("\n".join(map(str, repeated)))
        with tarfile.open(packed, "w") as archive:
            for number, file in enumerate(repeated):
                archive.add(file, f"{number}.jpg")
        cases = {"files": (listed,), "tar": (packed,), "ray": (listed, "--ray", "local")}
        rate, cpu_ms = run_bare(given.bundle)
        for case, (source, *options) in cases.items():
            out = folder / case
            words = [
                "classify",
                given.bundle,
                source,
                "--out",
                out,
                "--workers",
                "1",
                "--setting",
                "threads=1",
            ]
            seconds, used, peak = run_command(*map(str, [*words, *options]))
            for what, ours, other, unit in (
                ("", given.count / seconds, rate, "images/s"),
                (", cpu", 1000 * used / given.count, cpu_ms, "ms"),
            ):
                name = f"{case}{what}"
                results.append(
                    Result(case=name, against="bare runtime", ours=ours, other=other, unit=unit, runs=1)
                )
            results.append(Result(case=f"{case}, memory", ours=peak, unit="MiB", runs=1))
        if pq.read_table(folder / "ray") != pq.read_table(folder / "files"):
            raise DataError("the rows of --ray differ")
    report(results, as_json=given.json)


if __name__ == "__main__":
    with one_line_errors():
        main()
