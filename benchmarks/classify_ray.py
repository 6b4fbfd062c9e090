"""`sopdeploy classify --ray local` compared with `classify`: the overhead, and growth with actors.

    python benchmarks/classify_ray.py --images photos --bundle BUNDLE --count 10000
    python benchmarks/classify_ray.py --images photos --bundle BUNDLE --count 2000 --actors 1,2,4

Times (s) and processor times of all processes (cpu-s) are those of the whole commands: also of the list, of
Ray, of loading the bundle and of the report. Other load affects processor times least. With several numbers
of actors, each actor and the other side have one decoder process and one thread of the runtime. The files of
--images are repeated up to --count.
"""

import argparse
import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
from measure import Result, existing, make_parser, one_line_errors, report

from sopdeploy.errors import DataError

SAMPLE_SECONDS = 0.2  # the last of a process is not counted


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=existing, required=True, help="folder of images")
    parser.add_argument("--bundle", type=existing, required=True)
    parser.add_argument("--count", type=int, default=10_000, help="images")
    parser.add_argument("--actors", default="1", help="numbers of actors, such as 1,2,4")
    return parser.parse_args()


def seconds(bundle: Path, images: Path, out: Path, *options: str) -> tuple[float, float]:
    """Run `sopdeploy classify`; return its time and the processor time of all of its processes."""
    command = [sys.executable, "-m", "sopdeploy", "classify", str(bundle), str(images), "--out", str(out)]
    started, used = time.perf_counter(), dict[int, float]()
    with subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL) as child:
        while child.poll() is None:
            used |= processor_seconds(child.pid)
            time.sleep(SAMPLE_SECONDS)
    if child.returncode:
        sys.exit(child.returncode)
    return time.perf_counter() - started, sum(used.values())


def processor_seconds(process: int) -> dict[int, float]:
    """Read the processor time of *process* and its descendants, by process ID (Linux)."""
    parents, used = dict[int, int](), dict[int, float]()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            parents[int(entry.name)] = int(fields[1])
            used[int(entry.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    found, waiting = dict[int, float](), [process]
    while waiting:
        one = waiting.pop()
        found[one] = used.get(one, 0.0)
        waiting += [child for child, parent in parents.items() if parent == one]
    return found


def main() -> None:
    """Measure and report."""
    given = arguments()
    actors = list(map(int, given.actors.split(",")))
    files = sorted(path.absolute() for path in given.images.rglob("*") if path.suffix in {".jpg", ".jpeg"})
    if not files:
        raise DataError(f"{given.images}: no JPEG files")
    one = ("--workers", "1", "--setting", "threads=1") if len(actors) > 1 else ()
    results = []
    with tempfile.TemporaryDirectory(prefix="r") as name:
        folder = Path(name)
        listed = folder / "images.txt"
        listed.write_text("\n".join(map(str, itertools.islice(itertools.cycle(files), given.count))))
        here = seconds(given.bundle, listed, folder / "here", *one)
        for number in actors:
            out = folder / f"actors-{number}"
            options = ("--ray", "local", "--actors", str(number), *one)
            case = f"{given.count:,} images, {number} actors"
            both = zip(("s", "cpu-s"), seconds(given.bundle, listed, out, *options), here, strict=True)
            for unit, ours, other in both:
                results.append(
                    Result(case=case, against="classify", ours=ours, other=other, unit=unit, runs=1)
                )
            if pq.read_table(out) != pq.read_table(folder / "here"):
                raise DataError(f"{case}: rows differ from those of classify")
    report(results, as_json=given.json)


if __name__ == "__main__":
    with one_line_errors():
        main()
