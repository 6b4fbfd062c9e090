"""Compares the real server, with a simulated runtime, to the simulation of `capacity_simulation`.

    python benchmarks/capacity_server.py --rounds 5

Each case is a load on one process: a number of clients that send the next request after each response, or a
Poisson stream. Ratios are real / simulated. The simulation uses the configured batch times and the measured
CPU time per image. Client and server share the cores; `core` is the fraction of a core that one thread
received before and after the round. If it is far below 1, other load disturbs the measurement: use the
quietest round and the slower runtime, whose batches depend least on decoders that wait for a core.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from capacity_model import System
from capacity_simulation import Figures, Simulation
from load import SEED, WARM_UP_SECONDS, Load, put_load
from measure import Result, make_parser, report
from serving_alone import decode_ms, write_images
from serving_peers import OURS, free_port, started

HERE = Path(__file__).resolve().parent
LOOP_MS = 0.2  # CPU time of a request besides decoding: benchmarks/request_cpu.py
DECODERS = 2  # of serving_ours.py
HELD = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A runtime (ms per batch and per image), and a load: *clients*, or a stream of *rate* images/s.

    A client sends the next request after each response.
    """

    engine: tuple[float, float]
    largest: int
    clients: int = 0
    rate: float | None = None

    @property
    def name(self) -> str:
        """Description of the case."""
        fixed, each = self.engine
        load = f"{self.clients} connections" if self.rate is None else f"{self.rate:g} images/s"
        return f"{fixed:g} + {each:g} n ms, at most {self.largest}: {load}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """A case in one round: measured and simulated values, and the available fraction of a core."""

    case: str
    real: Load
    batch: float
    simulated: Figures
    core: float

    @property
    def ratios(self) -> tuple[float, float, float, float]:
        """Real / simulated: images per second, mean batch size, p50 and p99."""
        real, other = self.real, self.simulated
        return (
            real.images_per_s / other.images_per_s,
            self.batch / other.batch,
            real.p50_ms / other.p50_ms,
            real.p99_ms / other.p99_ms,
        )


CASES = (
    Case(engine=(20, 10), largest=8, clients=32),
    Case(engine=(20, 10), largest=8, clients=4),
    Case(engine=(20, 10), largest=8, rate=48),
    Case(engine=(160, 80), largest=8, clients=32),
    Case(engine=(160, 80), largest=8, rate=6),
)


def simulated(case: Case, decoding: float, seconds: float) -> Figures:
    """Simulate *case* with the arrival times of `load.py`."""
    system = System(
        fixed_ms=case.engine[0],
        each_ms=case.engine[1],
        largest=case.largest,
        decode_ms=decoding,
        loop_ms=LOOP_MS,
        decoders=DECODERS,
    )
    play = Simulation(system, route="round-robin", held=HELD, seed=SEED)
    images = int(2 * (WARM_UP_SECONDS + seconds) * (case.rate or system.capacity))
    outcome = play.closed_loop(case.clients, images) if case.rate is None else play.poisson(case.rate, images)
    return outcome.measured(1000 * WARM_UP_SECONDS, 1000 * (WARM_UP_SECONDS + seconds))


def measured(case: Case, folder: Path, seconds: float) -> tuple[Load, dict[str, float]]:
    """Put the load of *case* on a server; return the client's result and the server's metrics."""
    port = free_port()
    fixed, each = case.engine
    command = [sys.executable, str(HERE / "serving_ours.py"), "--port", str(port)]
    command += ["--fake", f"{fixed},{each}", "--largest", str(case.largest)]
    with started(command, OURS, port, {}, HERE):
        clients = ("--connections", case.clients) if case.rate is None else ("--rate", case.rate)
        load = put_load(f"http://127.0.0.1:{port}/v1/classify", folder, seconds, *clients)
        return load, metrics(port)


def metrics(port: int) -> dict[str, float]:
    """Read the metrics of the server on *port* by name, summed over labels."""
    found: dict[str, float] = {}
    for line in httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines():
        if not line.startswith("#"):
            name = line.partition("{")[0].partition(" ")[0]
            found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
    return found


def core_share(folder: Path) -> float:
    """Measure the fraction of a core that a thread receives while it decodes the images in *folder*."""
    started = time.perf_counter()
    spent = decode_ms(folder) * len(list(folder.iterdir())) / 1000
    return spent / (time.perf_counter() - started)


def one(case: Case, folder: Path, seconds: float) -> Round:
    """Measure and simulate *case* once."""
    before = core_share(folder)
    real, values = measured(case, folder, seconds)
    core = (before + core_share(folder)) / 2
    return Round(
        case=case.name,
        real=real,
        batch=values["sopdeploy_batch_size_sum"] / values["sopdeploy_batch_size_count"],
        simulated=simulated(case, decode_ms(folder), seconds),
        core=core,
    )


def show(rounds: list[Round]) -> None:
    """Print medians over the rounds, and the round with the least other load."""
    print("| case | | images/s | batch | p50 ms | p99 ms | core |\n|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(each.case for each in rounds):
        found = [each for each in rounds if each.case == name]
        best = max(found, key=lambda each: each.core)
        seen = best.simulated
        shown = f"{seen.images_per_s:.1f} | {seen.batch:.2f} | {seen.p50_ms:.0f} | {seen.p99_ms:.0f}"
        print(f"| {name} | simulated | {shown} | |")
        medians = [statistics.median(values) for values in zip(*(each.ratios for each in found), strict=True)]
        usual = statistics.median(each.core for each in found)
        for what, ratios, core in (
            ("quietest round", best.ratios, best.core),
            (f"median of {len(found)}", medians, usual),
        ):
            print(f"| | {what} | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + f" | {core:.2f} |")


def results(rounds: list[Round]) -> list[Result]:
    """Compare medians over the rounds with the simulation."""
    found = []
    for name in dict.fromkeys(each.case for each in rounds):
        of_case = [each for each in rounds if each.case == name]
        for what, unit, real, simulated_value in (
            ("throughput", "images/s", lambda r: r.real.images_per_s, lambda r: r.simulated.images_per_s),
            ("batch size", "images", lambda r: r.batch, lambda r: r.simulated.batch),
            ("p50", "ms", lambda r: r.real.p50_ms, lambda r: r.simulated.p50_ms),
            ("p99", "ms", lambda r: r.real.p99_ms, lambda r: r.simulated.p99_ms),
        ):
            found.append(
                Result(
                    case=f"{name}: {what}",
                    against="simulation",
                    ours=statistics.median(map(real, of_case)),
                    other=statistics.median(map(simulated_value, of_case)),
                    unit=unit,
                    runs=len(of_case),
                )
            )
    return found


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_images(Path(temporary))
        rounds = [one(case, folder, arguments.seconds) for _ in range(arguments.rounds) for case in CASES]
    if arguments.json:
        report(results(rounds), as_json=True)
    else:
        show(rounds)


if __name__ == "__main__":
    main()
