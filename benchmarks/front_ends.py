"""Front ends and an engine process (`front_ends` above 1) against a single process, with simulated runtimes.

    python benchmarks/front_ends.py --rounds 5 --json

- `CPU per image`: all processes of the server, without decoding and inference. Limit: 0.04 ms more.
- `p50 at light load`: one connection. Limit: 0.2 ms more.
- `engine CPU per image`: eight processes fill the slots as front ends do; the runtime returns constants.
  Limit: 0.02 ms.
- `images/s with an emulated GIL load`: a decoder sleeps (C code without the interpreter lock) and then spins
  (Python with it), so the cores of the machine do not limit it. 4 front ends with 4 decoders each, against
  the best number of decoders in one process. Limit: 1.3 times.

It starts the processes of a server itself, because a server has no simulated decoders.
"""

import argparse
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

import httpx
import numpy as np
import uvicorn
from measure import Result, report
from serving_alone import write_images
from serving_ours import CLASSES, fake_model
from serving_peers import cpu_seconds

from sopdeploy_service.app import create_app
from sopdeploy_service.images import loaders
from sopdeploy_service.images.decode import Decoded
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
SLEEP_MS, SPIN_MS = 2.13, 0.19  # of decoding a JPEG of 500 x 375 pixels without and with the interpreter lock
SENDERS, IN_FLIGHT = 8, 24
PREFIX = 'sopdeploy_requests_total{code="200",model="model",route="/v1/classify"} '


class Constant:
    """Returns the same outputs for every batch after *milliseconds*; a batch may overlap the one before."""

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


def spin(milliseconds: float) -> None:
    """Use CPU time of this thread while holding the interpreter lock."""
    end = time.thread_time() + milliseconds / 1000
    while time.thread_time() < end:
        pass


def fake_decode(*, emulate: bool) -> Callable[..., Decoded]:
    """Create a decoder that returns a constant image, after the emulated time if requested."""
    image = Decoded(np.zeros((224, 224, 3), dtype=np.uint8), (), (224, 224))

    def decode(*_: object, **__: object) -> Decoded:
        if emulate:
            time.sleep(SLEEP_MS / 1000)
            spin(SPIN_MS)
        return image

    return decode


def run_role(order: dict[str, Any]) -> None:
    """Be one process of the server, or a sender that needs no HTTP."""
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
    loaders.decode = fake_decode(emulate=order["emulate"])  # type: ignore[assignment]
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
    """Keep slots at the engine busy and print the number of replies."""
    client.connect()
    count, end = 0, time.monotonic() + seconds

    class Resend:
        def on_reply(self, slot: Slot, reply: object, shared: object) -> None:  # noqa: ARG002
            nonlocal count
            count += 1
            replied.append(slot)

    owner, replied = Resend(), client.take(IN_FLIGHT) or []
    while time.monotonic() < end:
        now = time.monotonic()
        slots, replied[:] = list(replied), []
        for slot in slots:
            if slot.sent:
                (slot,) = client.take(1) or ()
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
        pages = [httpx.get(f"{address}/metrics").text.splitlines() for address in self.private]
        return sum(
            float(line.removeprefix(PREFIX)) for page in pages for line in page if line.startswith(PREFIX)
        )

    def cpu(self) -> float:
        """Sum the CPU seconds of all processes."""
        return sum(cpu_seconds(child.pid) for child in self.children.values())


def start(order: dict[str, Any], files: Sequence[int]) -> "subprocess.Popen[str]":
    """Start a process of this program and wait until it is ready, unless it is a front end."""
    command = [sys.executable, str(HERE), "--role", json.dumps(order)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=list(files))


@contextmanager
def running(
    front_ends: int, *, decoders: int = 4, emulate: bool = False, senders: float = 0, batch_ms: float = 0
) -> Iterator[Server]:
    """Start a server with so many *front_ends*, or with processes that only send for so many seconds."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(end) for end in bind_group("127.0.0.1", 0, front_ends)]
        private = [stack.enter_context(bind("127.0.0.1", 0)) for _ in listeners]
        children: dict[str, subprocess.Popen[str]] = {}
        base = {"batch_ms": batch_ms, "decoders": decoders, "emulate": emulate, "seconds": senders}

        def launch(name: str, order: dict[str, Any], files: Sequence[int]) -> "subprocess.Popen[str]":
            children[name] = child = start(base | order, files)
            stack.callback(child.wait)
            stack.callback(child.kill)
            return child

        sockets = [(one.fileno(), other.fileno()) for one, other in zip(listeners, private, strict=True)]
        if front_ends == 1:
            launch("0", {"role": "server", "sockets": sockets[0]}, sockets[0])
        else:
            peers = [Peer(str(number)) for number in range(front_ends)]
            group = EngineGroup(Peer("engine"), peers)
            stack.callback(group.close)
            for peer, pair in zip([group.engine, *peers], [(), *sockets], strict=True):
                role = "engine" if peer is group.engine else "sender" if senders else "server"
                with group.open_broker(peer) as broker:
                    order = {"role": role, "broker": broker.fileno(), "sockets": pair}
                    child = launch(peer.name, order, [broker.fileno(), *pair])
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


def load(server: Server, folder: Path, connections: int, seconds: float) -> dict[str, float]:
    """Put load on *server*; return what `load.py` prints."""
    command = [sys.executable, str(HERE.parent / "load.py"), f"{server.url}/v1/classify", str(folder)]
    command += ["--connections", str(connections), "--seconds", str(seconds)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return cast(dict[str, float], json.loads(done.stdout))


def cpu_and_latency(front_ends: int, folder: Path, seconds: float) -> tuple[float, float]:
    """Measure CPU ms per image under load, and p50 in ms with one connection."""
    with running(front_ends, batch_ms=BATCH_MS) as server:
        load(server, folder, 32, 0.1)
        images, spent = server.images(), server.cpu()
        load(server, folder, 32, seconds)
        per_image = 1000 * (server.cpu() - spent) / (server.images() - images)
        return per_image, load(server, folder, 1, seconds)["p50_ms"]


def engine_cpu(seconds: float) -> float:
    """Measure CPU ms of the engine per image, with eight senders."""
    with running(SENDERS, senders=seconds) as server:
        engine = server.children.pop("engine")
        before = cpu_seconds(engine.pid)
        images = sum(int(read_line(child)) for child in server.children.values())
        return 1000 * (cpu_seconds(engine.pid) - before) / images


def emulated(front_ends: int, decoders: int, folder: Path, seconds: float) -> float:
    """Measure images/s with decoders that sleep and spin."""
    with running(front_ends, decoders=decoders, emulate=True) as server:
        return load(server, folder, 64, seconds)["images_per_s"]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--role", type=json.loads, help="be one process of the server (used internally)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    if arguments.role is not None:
        run_role(arguments.role)
        return
    rounds, seconds = arguments.rounds, arguments.seconds
    sides: dict[str, list[tuple[float, float]]] = {"two": [], "one": []}
    figures: dict[str, list[float]] = {"engine": [], "4x4": [], "best": []}
    with tempfile.TemporaryDirectory() as name:
        folder = write_images(Path(name))
        for _ in range(rounds):
            for side, count in (("two", 2), ("one", 1)):
                sides[side].append(cpu_and_latency(count, folder, seconds))
            figures["engine"].append(engine_cpu(seconds))
            figures["best"].append(max(emulated(1, decoders, folder, seconds) for decoders in (4, 8, 16)))
            figures["4x4"].append(emulated(4, 4, folder, seconds))
    median = {
        side: [statistics.median(column) for column in zip(*values, strict=True)]
        for side, values in sides.items()
    }
    medians = {name: statistics.median(values) for name, values in figures.items()}
    common = {"runs": rounds}
    results = [
        Result(
            case="CPU per image, 2 front ends",
            against="1 process",
            ours=median["two"][0],
            other=median["one"][0],
            unit="cpu-ms",
            **common,
        ),
        Result(
            case="p50 at light load, 2 front ends",
            against="1 process",
            ours=median["two"][1],
            other=median["one"][1],
            unit="ms",
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
