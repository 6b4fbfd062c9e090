"""Peak memory and CPU time of decoding, compared with the estimates of `sopdeploy.images.cost`.

    python benchmarks/decode_cost.py [--only WebP] [--folder FOLDER]

Decodes each hostile image, or each file of a folder, in a process of its own. Use it to correct the factors
of `sopdeploy/images/cost.py` for another version of Pillow. Linux only.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from hostile_images import encoded, hostile_images
from measure import Result, existing, make_parser, report

from sopdeploy.errors import ImageError
from sopdeploy.images.cost import Cost
from sopdeploy.images.formats import prepare_decoders
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.images.decode import EncodedImage, decode
from sopdeploy_service.server.process import limit_heaps

decode_any = partial(decode, max_bytes=30_000_000, max_pixels=70_000_000)


class Measured(NamedTuple):
    """Bytes and milliseconds of one image, measured and estimated; *error* if it is not decoded."""

    memory: float
    ms: float
    estimate: Cost | None
    error: str


def measure_all(files: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, Measured]]:
    """Decode each of *files* in a child process; yield its name and the measurements."""
    limit_heaps()
    prepare_decoders()
    small = EncodedImage(encoded("JPEG", "RGB", 500, 375))
    for name, body in files:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                decode_any(small, Preprocess())  # imports, first allocations
                os.write(writing, json.dumps(_measure(body)).encode())
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            memory, ms, estimate, error = json.loads(pipe.read())
        os.waitpid(child, 0)
        yield name, Measured(memory, ms, Cost(*estimate) if estimate else None, error)


def _measure(body: bytes) -> tuple[float, float, Cost | None, str]:
    costs: list[Cost] = []
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, started, error = _peak(), time.thread_time(), ""
    try:
        decode_any(EncodedImage(body), Preprocess(), admit=costs.append)
    except ImageError as problem:
        error = f"{problem.status} {problem}"
    ms = 1000 * (time.thread_time() - started)
    return _peak() - before, ms, costs[0] if costs else None, error


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", default="", help="only files with this in their name")
    parser.add_argument("--folder", type=existing, help="measure the files of this folder")
    arguments = parser.parse_args()
    files = hostile_images(arguments.only)
    if arguments.folder:
        files = ((path.name, path.read_bytes()) for path in sorted(arguments.folder.iterdir()))
    results = []
    for name, found in measure_all(files):
        case = f"{name}: {found.error}" if found.error else name
        estimate = found.estimate or Cost(0, 0)
        for unit, ours, other in (
            ("MB", found.memory / 1e6, estimate.memory / 1e6),
            ("cpu-ms", found.ms, estimate.ms),
        ):
            results.append(Result(case=case, against="estimate", ours=ours, other=other, unit=unit, runs=1))
    report(results, as_json=arguments.json)


if __name__ == "__main__":
    main()
