"""Serve one folder of bundles with two versions behind one balancer, and move the live link with either.

    python deploy/rolling_upgrade.py OLD/bin/sopdeploy NEW/bin/sopdeploy

Each version exports and signs a bundle, which the other pulls and serves. Every step runs under
load: a promotion or its undoing by either version, and the exchange of a server for one of the
other version. Exits with 1 if a request fails, if the versions answer differently, or if a
server does not follow. The environments of both need `sopdeploy[cpu,train,sign]`; `openssl`
generates the key.
"""

import itertools
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from container_test import check, free_port

from commands import run

TRAIN = (
    "train",
    "--recipe",
    "digits-dsop",
    "--set",
    "epochs=1",
    "--set",
    "model.config.base_width=4",
)
NEW_KEY = (  # as in docs/transfer.md
    "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out release.key",
    "openssl pkey -in release.key -pubout -out release.key.pub",
)
SIGNED = ("--require-signature", "release.key.pub")
WAIT_SECONDS = 60


class Server:
    """`serve` of *program* on the live link of *folder*, on a port of its own."""

    def __init__(self, program: Path, folder: Path, stack: ExitStack) -> None:
        """Start the server; it is killed at the end of *stack*, if it still runs."""
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / f"{port}.log"
        command = [
            program,
            "serve",
            "bundles/live",
            "--setting=follow=true",
            f"--port={port}",
            *SIGNED,
        ]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        stack.callback(self.process.kill)

    def bundle(self) -> str:
        """Return the name of the served bundle; empty if the server does not answer."""
        try:
            return str(httpx.get(f"{self.url}/info").json()["models"][0]["bundle"])
        except (httpx.HTTPError, ValueError):
            return ""

    def follow(self, name: str) -> None:
        """Wait until the server serves the bundle *name*; exit with its log if it does not."""
        deadline = time.monotonic() + WAIT_SECONDS
        while self.bundle() != name:
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"does not serve {name}:\n{self.log.read_text()}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End the server like an orchestrator; it answers what it has admitted."""
        self.process.terminate()
        check("a stopped server exits with 0", holds=self.process.wait(WAIT_SECONDS) == 0)


class Balancer:
    """Sends requests to the *servers* in turn; one that is closed or drains is left out for this request."""

    def __init__(self, servers: list[Server], photo: bytes) -> None:
        self.servers, self._photo = servers, photo
        self.results: Counter[str] = Counter()

    def classify(self, server: Server) -> Any:
        """Return the response of *server*."""
        return httpx.post(f"{server.url}/v1/classify", content=self._photo, timeout=30)

    def send(self, number: int) -> None:
        """Send request *number* to the first server that takes it, and count its result."""
        # Begin with another server each time.
        servers = list(self.servers)  # a copy, because `upgrade` changes the list meanwhile
        turn = number % len(servers)
        for server in (*servers[turn:], *servers[:turn]):
            try:
                response = self.classify(server)
            except httpx.ConnectError:  # its port is closed, so it has not got the request
                continue
            except httpx.TransportError as error:
                # The server may have got it; a balancer must not send it again.
                self.results[f"failed: {type(error).__name__}"] += 1
                return

            # One that drains still has its port open.
            is_unavailable = response.status_code == httpx.codes.SERVICE_UNAVAILABLE
            if is_unavailable and '"draining"' in response.text:
                continue
            self.results["answered" if response.is_success else f"failed: {response.text}"] += 1
            return

        self.results["failed: no server"] += 1

    @contextmanager
    def load(self) -> Iterator[None]:
        """Send requests during the block."""
        ended = threading.Event()

        def client() -> None:
            for number in itertools.count():
                if ended.is_set():
                    return
                self.send(number)

        clients = [threading.Thread(target=client) for _ in range(2)]
        for thread in clients:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            for thread in clients:
                thread.join()

    def check_bundle(self, step: str, name: str) -> None:
        """Wait until all servers serve the bundle *name*, and compare their answers."""
        for server in self.servers:
            server.follow(name)
        answers = [self.classify(server).json()["classes"] for server in self.servers]
        check(
            f"{step}: all serve {name} and answer equally",
            holds=all(each == answers[0] for each in answers),
        )


def upgrade(programs: dict[str, Path], folder: Path) -> None:
    """Take all steps in *folder* with both *programs*, "old" and "new"; exit if a request fails."""

    def sopdeploy(which: str, *arguments: str) -> None:
        run(programs[which], *arguments, cwd=folder)

    # Each program makes a signed bundle and puts it into the store.
    for command in NEW_KEY:
        run(*command.split(), cwd=folder)
    names = {}
    for seed, which in enumerate(programs):
        sopdeploy(which, *TRAIN, "--set", f"seed={seed}", "--out", which)
        sopdeploy(
            which,
            "export",
            f"{which}/best.pt",
            "--detach",
            "--max-batch",
            "1",
            "--out",
            "bundles",
        )
        names[which] = (folder / "bundles" / "latest").resolve().name
        sopdeploy(which, "sign", f"bundles/{names[which]}", "--key", "release.key")
        sopdeploy(which, "push", f"bundles/{names[which]}", "store")

    # Each pulls and verifies both bundles.
    for which, name in itertools.product(programs, names.values()):
        sopdeploy(which, "pull", f"store/{name}.tar", f"pulled-{which}", *SIGNED)
        sopdeploy(which, "verify", f"pulled-{which}/{name}")
        check(f"{which} pulls {name}, and verifies it and its signature", holds=True)

    # A server of each program follows the live link, under load.
    sopdeploy(
        "old",
        "promote",
        f"bundles/{names['old']}",
        "--over",
        "bundles/live",
        "--force",
        "first",
    )
    photo = (folder / "bundles" / names["old"] / "golden-0.jpg").read_bytes()
    with ExitStack() as stack:
        balancer = Balancer(
            [Server(program, folder, stack) for program in programs.values()], photo
        )
        balancer.check_bundle("start", names["old"])
        with balancer.load():
            # Each program promotes its bundle, then the other one and itself move back.
            for which, other in (("new", "old"), ("old", "new")):
                forward, back = names[which], names[other]
                promote = (
                    "promote",
                    f"bundles/{forward}",
                    "--over",
                    "bundles/live",
                    "--force",
                    "rehearsal",
                )
                sopdeploy(which, *promote)
                balancer.check_bundle(f"{which} promotes", forward)
                for mover, name in ((other, back), (which, forward)):
                    sopdeploy(mover, "promote", "--back", "bundles/live")
                    balancer.check_bundle(f"{mover} moves back", name)

            # Replace the servers one by one: by the new program, then by the old one.
            for step, which in (("upgrade", "new"), ("downgrade", "old")):
                balancer.servers.append(Server(programs[which], folder, stack))
                balancer.check_bundle(step, names["old"])
                balancer.servers.pop(0).stop()

        for server in balancer.servers:
            server.stop()

    failed = {text: count for text, count in balancer.results.items() if text != "answered"}
    check(
        f"{balancer.results['answered']} requests answered, failed: {failed or 'none'}",
        holds=not failed,
    )


if __name__ == "__main__":
    with TemporaryDirectory(prefix="rolling-") as scratch:
        old, new = (Path(text).absolute() for text in sys.argv[1:3])
        upgrade({"old": old, "new": new}, Path(scratch))
