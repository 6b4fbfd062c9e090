"""CPU microseconds per image by stage, for each kind of process of a server at full load.

    python benchmarks/serving_stages.py [--quick] [--kind "12 MP" ...] [--json]

The device is simulated (1 + 0.05 n ms, at most 64 images) and uses no CPU. Servers: one process, and one
engine with two front ends, each with real decoders (JPEGs of 500 x 375) and with constants instead; with
--kind, only the engine with two front ends and real decoders, for each kind of photograph of
`serving_alone.KINDS`. "16 cores" is what `simulated_cores` makes of the times of two front ends. The CPU
time of a process is that of the kernel's accounts; its stages are shares of the samples that are taken every
millisecond of CPU time, by the innermost frame of the main thread that belongs to a stage. Time in which the
main thread waits belongs to other threads. CPU times depend less on other load than rates do, but caches and
the number of images per batch do depend on it: compare results of one machine and one run.
"""

import json
import os
import signal
import tempfile
from collections import Counter
from pathlib import Path
from types import FrameType

from load import put_load
from measure import Result, make_parser, report
from serving_alone import KINDS, write_images
from serving_peers import cpu_seconds, own_cpu_seconds
from simulated_cores import CORES, Costs, simulate
from simulated_server import Server, running

BATCH = "1,0.05,64"
STAGES = {  # the innermost frame whose path has one of these parts decides
    "metrics": ("prometheus_client", "observability/metrics"),
    "admission": ("api/admission", "http/forms", "http/strict_json"),
    "middleware": ("http/middleware", "http/api_keys", "origins.py"),
    "hand-over to the decoder": ("inference/decoders", "decoding/pool", "decoding/child"),
    "queue and batch": ("inference/model_worker", "devices/remote", "devices/channel", "devices/engine"),
    "request loop": ("inference/service", "inference/model.py"),
    "answer": ("api/v1", "sopdeploy/decision", "sopdeploy/http_api"),
    "HTTP": ("server/http_protocol", "uvicorn/", "server/draining_server"),
    "app": ("starlette/", "fastapi/", "anyio/"),
    "supervisor": ("devices/control",),
    "simulated device": ("fake_runtime",),
}
OTHER = "event loop and other threads"
ALL = [("500 x 375", front_ends, constants) for constants in (True, False) for front_ends in (0, 2)]


class Sampler:
    """Counts samples of this process by stage, and writes them to *folder* when told to."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._counts = folder, Counter[str]()
        signal.signal(signal.SIGPROF, self._sample)
        signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)

    def _sample(self, _number: int, frame: FrameType | None) -> None:
        while frame is not None:
            path = frame.f_code.co_filename
            for stage, parts in STAGES.items():
                if any(part in path for part in parts):
                    self._counts[stage] += 1
                    return
            frame = frame.f_back
        self._counts[OTHER] += 1

    def write(self) -> None:
        """Write the counts, and stop."""
        signal.setitimer(signal.ITIMER_PROF, 0)
        (self._folder / f"{os.getpid()}.json").write_text(json.dumps(self._counts))


def measure(
    settings: dict[str, object], folder: Path, seconds: float, photographs: str, *, constants: bool
) -> list[Result]:
    """Measure a server with *settings* under a load of *photographs*, a key of `KINDS`."""
    decoded = "constants" if constants else photographs
    kind = f"{settings['front_ends']} front ends, {decoded}"
    with tempfile.TemporaryDirectory() as samples:
        os.environ["SIMULATED_SAMPLES"] = samples
        os.environ["SIMULATED_DECODING"] = "constants" if constants else "real"
        with running({"devices": "cpu", "queue_size": 1024, **settings}, BATCH) as server:
            processes = names_of(server)
            before = {name: spent(process) for name, process in processes.items()}
            load = put_load(f"{server.url}/v1/classify", folder, seconds, "--connections", 64)
            after = {name: spent(process) for name, process in processes.items()}
        counts = {name: read(Path(samples), process) for name, process in processes.items()}
    images = load.all_answered
    results = [Result(case=f"{kind}: rate", ours=load.images_per_s, unit="images/s", runs=1)]
    kinds = {"engine": ["cpu"], "front ends": [name for name in processes if name.startswith("front-")]}
    if not kinds["front ends"]:
        kinds = {"process": ["cpu"]}
    spent_us: dict[str, float] = {}  # by kind of process
    for title, names in kinds.items():
        own, decoders = (
            sum(after[name][part] - before[name][part] for name in names) * 1e6 / images for part in (0, 1)
        )
        results.append(Result(case=f"{kind}: {title}", ours=own, unit="cpu-us", runs=1))
        total = sum((counts[name] for name in names), Counter[str]())
        for stage, count in total.most_common():
            share = own * count / total.total()
            results.append(Result(case=f"{kind}: {title}: {stage}", ours=share, unit="cpu-us", runs=1))
        spent_us[title] = own
        if title != "engine":
            spent_us["decoders"] = decoders
            results.append(Result(case=f"{kind}: decoder processes", ours=decoders, unit="cpu-us", runs=1))
    if "engine" in spent_us and not constants:
        costs = Costs(*(spent_us[title] / 1000 for title in ("front ends", "decoders", "engine")))
        results.append(Result(case=f"{kind}: {CORES} cores", ours=simulate(costs), unit="images/s", runs=1))
    return results


def names_of(server: Server) -> dict[str, int]:
    """Return the ids of the server's processes by name, without their template."""
    found: dict[str, int] = {}
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split() if entry.name.isdecimal() else []
            if fields and int(fields[1]) == server.child.pid:
                found[(entry / "comm").read_text().strip()] = int(entry.name)
        except OSError:
            continue
    found.pop("template", None)
    return found


def spent(process: int) -> tuple[float, float]:
    """Return the CPU seconds of *process* and those of its children."""
    own = own_cpu_seconds(process)
    return own, cpu_seconds(process) - own


def read(folder: Path, process: int) -> Counter[str]:
    """Read the samples of *process*."""
    return Counter(json.loads((folder / f"{process}.json").read_text()))


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter runs")
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="photographs; can be repeated")
    arguments = parser.parse_args()
    results: list[Result] = []
    runs = [(kind, 2, False) for kind in arguments.kind or ()]
    seconds = 4.0 if arguments.quick else 20.0
    with tempfile.TemporaryDirectory() as name:
        for number, (kind, front_ends, constants) in enumerate(runs or ALL):
            folder = write_images(Path(name) / str(number), 3 if arguments.kind else 32, KINDS[kind])
            settings: dict[str, object] = {"front_ends": front_ends, "decoders": 2 - (front_ends > 0)}
            results += measure(settings, folder, seconds, kind, constants=constants)
    report(results, as_json=arguments.json, load=os.getloadavg()[0])


if __name__ == "__main__":
    main()
