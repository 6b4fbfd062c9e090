"""Front ends and an engine process (`front_ends` above 1) against a single process, with simulated runtimes.

    python benchmarks/front_ends.py --rounds 5 --json

- `CPU per image`: all processes of the server, without decoding and inference. Limit: 0.04 ms more. Every
  front end has as many connections as the single process, 32. With half of them, a process would receive
  fewer images at a time and need more CPU time for each; `32 connections in total` measures that case. Two
  processes without an engine show what the distribution of the connections alone costs.
- `p50 at light load`: one connection. Limit: 0.2 ms more.
- `engine CPU per image`: eight processes fill the slots as front ends do; the runtime returns constants.
  Limit: 0.02 ms.
- `images/s with an emulated GIL load`: a decoder sleeps (C code without the interpreter lock) and then spins
  (Python with it), so the cores of the machine do not limit it. 4 front ends with 4 decoders each, against
  the best number of decoders in one process. Limit: 1.3 times.

The program starts the processes of a server itself, because `sopdeploy serve` has no simulated decoders.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO, cast

import numpy as np
import uvicorn
from load import put_load
from measure import Result, make_parser, report
from serving_alone import write_images
from serving_ours import CLASSES, count_answered, fake_model, replace_decoder
from serving_peers import cpu_seconds

from sopdeploy_service.app import create_app
from sopdeploy_service.inference.engine_process.client import EngineClient, Slot
from sopdeploy_service.inference.engine_process.engine import Engine
from sopdeploy_service.inference.engine_process.models import EngineModel, ModelTable
from sopdeploy_service.inference.engine_process.slots import Request
from sopdeploy_service.server.front_ends import EngineGroup, Peer
from sopdeploy_service.server.process import http_config, prepare_process
from sopdeploy_service.server.sockets import bind, bind_group, url
from sopdeploy_service.settings import load_settings

HERE = Path(__file__).resolve()
BATCH, BATCH_MS = 32, 5.0  # images and duration of a batch for `CPU per image` and `p50`
SLEEP_MS, SPIN_MS = 2.13, 0.19  # decoding a JPEG of 500 x 375, without and with the lock
CONNECTIONS = 32  # per process under load
SENDERS, IN_FLIGHT = 8, 24
ONE, FRONT_ENDS = "1 process", "2 front ends"
HALF, SPLIT = "2 front ends, 32 connections in total", "2 processes without an engine"
SIDES = {  # processes for HTTP, whether they share an engine, connections
    ONE: (1, False, CONNECTIONS),
    FRONT_ENDS: (2, True, 2 * CONNECTIONS),
    HALF: (2, True, CONNECTIONS),
    SPLIT: (2, False, 2 * CONNECTIONS),
}


class Constant:
    """Runtime that returns the same outputs for every batch after *milliseconds*; two batches may overlap."""

    name, device, largest_batch = "constant", "fake", BATCH

    def __init__(self, milliseconds: float) -> None:
        self._seconds = milliseconds / 1000
        self._logits = np.random.default_rng(0).normal(size=(BATCH, CLASSES)).astype(np.float32)

    def run(self, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs of *images*."""
        return {"logits": self._logits[: len(images)]}

    def begin(self, images: Sequence[np.ndarray]) -> Callable[[], dict[str, np.ndarray]]:
        """Begin a batch of *images*; no pixel is read, as if the device read them from the slots."""

        def wait() -> dict[str, np.ndarray]:
            time.sleep(self._seconds)
            return self.run(images)

        return wait

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def emulate_decoding() -> None:
    """Sleep, then use CPU time of this thread while holding the interpreter lock."""
    time.sleep(SLEEP_MS / 1000)
    end = time.thread_time() + SPIN_MS / 1000
    while time.thread_time() < end:
        pass


def run_role(order: dict[str, Any]) -> None:
    """Run one process of the server, or a sender that needs no HTTP."""
    model = replace(fake_model(0, 0, BATCH), runtime=cast(Any, Constant(order["batch_ms"])))
    settings = load_settings(queue_size=1024, max_batch=BATCH, decoders=order["decoders"])
    broker = socket.socket(fileno=order["broker"]) if "broker" in order else None
    if order["role"] == "engine" and broker is not None:
        served = EngineModel("model", 1, model, settings)
        table = SimpleNamespace(models=lambda: {"model": [served]})
        engine = Engine(cast(ModelTable, table), broker)
        print("ready", flush=True)
        engine.run()
    elif order["role"] == "sender" and broker is not None:
        send(EngineClient(broker), order["seconds"])
    else:
        serve(order, settings, model, broker)


def serve(order: dict[str, Any], settings: Any, model: Any, broker: socket.socket | None) -> None:
    """Serve HTTP as the only process or as a front end."""
    replace_decoder(emulate_decoding if order["emulate"] else None)
    prepare_process()
    client = None
    if broker is not None:
        client = EngineClient(broker)
        client.connect()
    app = create_app({} if client else {"model": model}, settings, engine=client)
    server = uvicorn.Server(http_config(app, settings))
    print("ready", flush=True)
    server.run(sockets=[socket.socket(fileno=number) for number in order["sockets"]])


def send(client: EngineClient, seconds: float) -> None:
    """Keep `IN_FLIGHT` images at the engine for *seconds* and print the number of replies."""
    client.connect()
    count, end = 0, time.monotonic() + seconds

    class Resend:
        def on_reply(self, slot: Slot, reply: object, shared: object) -> None:  # noqa: ARG002
            nonlocal count
            count += 1
            replied.append(slot)

        def after_read(self, found: object) -> None:
            pass

    owner, replied = Resend(), client.take(IN_FLIGHT) or []
    while time.monotonic() < end:
        now = time.monotonic()
        slots, replied[:] = list(replied), []
        for slot in slots:
            if slot.sent:
                (slot,) = client.take(1) or []
            client.submit(slot, owner, Request(1, 0, 0, now, now + 60, slot.generation))
        client._read()
    print(count, flush=True)


@dataclass(frozen=True, slots=True)
class Server:
    """The processes of a running server, its URL and the private URLs of its front ends."""

    children: dict[str, "subprocess.Popen[str]"]
    url: str
    private: list[str]

    def images(self) -> float:
        """Read the number of answered requests."""
        return sum(count_answered(address) for address in self.private)

    def cpu(self) -> dict[str, float]:
        """Measure the CPU seconds of all processes, and those of the engine process."""
        spent = {name: cpu_seconds(child.pid) for name, child in self.children.items()}
        return {"all": sum(spent.values()), "engine": spent.get("engine", 0.0)}


def start(order: dict[str, Any], files: Sequence[int]) -> "subprocess.Popen[str]":
    """Start a process of this program with the role in *order*; it inherits the descriptors *files*."""
    command = [sys.executable, str(HERE), "--role", json.dumps(order)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=list(files))


@contextmanager
def running(
    count: int,
    *,
    engine: bool,
    decoders: int = 4,
    emulate: bool = False,
    senders: float = 0,
    batch_ms: float = 0,
) -> Iterator[Server]:
    """Start *count* processes with a runtime each or, with *engine*, as front ends of an engine process.

    If *senders* is above 0, the front ends serve no HTTP: they submit images to the engine for *senders*
    seconds.
    """
    with ExitStack() as stack:
        listeners = [stack.enter_context(end) for end in bind_group("127.0.0.1", 0, count)]
        private = [stack.enter_context(bind("127.0.0.1", 0)) for _ in listeners]
        children: dict[str, subprocess.Popen[str]] = {}
        base = {"batch_ms": batch_ms, "decoders": decoders, "emulate": emulate, "seconds": senders}

        def launch(name: str, order: dict[str, Any], files: Sequence[int]) -> "subprocess.Popen[str]":
            children[name] = child = start(base | order, files)
            stack.callback(child.wait)
            stack.callback(child.kill)
            return child

        sockets = [(one.fileno(), other.fileno()) for one, other in zip(listeners, private, strict=True)]
        if not engine:
            for number, pair in enumerate(sockets):
                launch(str(number), {"role": "server", "sockets": pair}, pair)
        else:
            peers = [Peer(str(number)) for number in range(count)]
            group = EngineGroup(Peer("engine"), peers)
            stack.callback(group.close)
            for peer, files in zip([group.engine, *peers], [(), *sockets], strict=True):
                role = "engine" if peer is group.engine else "sender" if senders else "server"
                with group.open_broker(peer) as broker:
                    order = {"role": role, "broker": broker.fileno(), "sockets": files}
                    child = launch(peer.name, order, [broker.fileno(), *files])
                if peer is group.engine:
                    read_line(child)
                    group.started(peer, child)
                    group.engine_ready()
                else:
                    group.started(peer, child)
        for name, child in children.items():
            if name != "engine" and not senders:
                read_line(child)
        yield Server(children, url(listeners[0]), [url(end) for end in private])


def read_line(child: "subprocess.Popen[str]") -> str:
    """Wait for the next line of *child*."""
    return cast(TextIO, child.stdout).readline()


def cpu_and_latency(side: str, folder: Path, seconds: float) -> dict[str, float]:
    """Measure CPU ms per image of `all` processes and of the `engine` under load, and `p50` in ms."""
    count, engine, connections = SIDES[side]
    with running(count, engine=engine, batch_ms=BATCH_MS) as server:
        url = f"{server.url}/v1/classify"
        put_load(url, folder, 0.1, "--connections", connections)
        images, before = server.images(), server.cpu()
        put_load(url, folder, seconds, "--connections", connections)
        after, images = server.cpu(), server.images() - images
        per_image = {name: 1000 * (after[name] - before[name]) / images for name in after}
        return per_image | {"p50": put_load(url, folder, seconds, "--connections", 1).p50_ms}


def engine_cpu(seconds: float) -> float:
    """Measure CPU ms of the engine per image, with eight senders."""
    with running(SENDERS, engine=True, senders=seconds) as server:
        engine = server.children.pop("engine")
        before = cpu_seconds(engine.pid)
        images = sum(int(read_line(child)) for child in server.children.values())
        return 1000 * (cpu_seconds(engine.pid) - before) / images


def emulated(front_ends: int, decoders: int, folder: Path, seconds: float) -> float:
    """Measure images/s with decoders that sleep and spin."""
    with running(front_ends, engine=front_ends > 1, decoders=decoders, emulate=True) as server:
        return put_load(f"{server.url}/v1/classify", folder, seconds, "--connections", 64).images_per_s


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--role", type=json.loads, help="run one process of the server (used internally)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    if arguments.role is not None:
        run_role(arguments.role)
        return
    rounds, seconds = arguments.rounds, arguments.seconds
    sides: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    figures: dict[str, list[float]] = {"engine": [], "4x4": [], "best": []}
    with tempfile.TemporaryDirectory() as name:
        folder = write_images(Path(name))
        for _ in range(rounds):
            for side, found in sides.items():
                found.append(cpu_and_latency(side, folder, seconds))
            figures["engine"].append(engine_cpu(seconds))
            figures["best"].append(max(emulated(1, decoders, folder, seconds) for decoders in (4, 8, 16)))
            figures["4x4"].append(emulated(4, 4, folder, seconds))

    def median(side: str, figure: str) -> float:
        return statistics.median(found[figure] for found in sides[side])

    medians = {name: statistics.median(values) for name, values in figures.items()}
    common = {"runs": rounds}
    results = [
        Result(
            case=f"{figure}, {side}",
            against=ONE,
            ours=median(side, measured),
            other=median(ONE, measured),
            unit=unit,
            **common,
        )
        for figure, measured, unit, compared in (
            ("CPU per image", "all", "cpu-ms", (FRONT_ENDS, HALF, SPLIT)),
            ("p50 at light load", "p50", "ms", (FRONT_ENDS,)),
        )
        for side in compared
    ]
    results += [
        Result(
            case=f"engine CPU per image, {FRONT_ENDS}",
            ours=median(FRONT_ENDS, "engine"),
            unit="cpu-ms",
            **common,
        ),
        Result(case="engine CPU per image, 8 front ends", ours=medians["engine"], unit="cpu-ms", **common),
        Result(
            case="emulated GIL load, 4 front ends x 4 decoders",
            against="best single process",
            ours=medians["4x4"],
            other=medians["best"],
            unit="images/s",
            **common,
        ),
    ]
    report(results, as_json=arguments.json, load=os.getloadavg()[0])


if __name__ == "__main__":
    main()
