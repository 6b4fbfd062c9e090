"""Calls of the Python client that are lost while a server is away: killed, and ready again some seconds later.

A start takes some seconds itself, so a server may be away for longer than was asked.

Callers classify one image after the other, each with a client of its own and `timeout=30`. Of two
servers, one goes away. Without nginx, two servers are two addresses of one name; with nginx, they
are an upstream. A call is lost if it raises an error. nginx must be installed for the rows with it
(`apt install nginx-light`); rows that need it are left out with a message otherwise.

    python benchmarks/away.py BUNDLE
    python benchmarks/away.py BUNDLE --away 2 --callers 8,32 --json
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from measure import Result, existing, make_parser, report

from sopdeploy.client import Client
from sopdeploy.errors import ServiceError
from sopdeploy.images.encode import encode_image

NAME = "servers.example"  # of all addresses
TIMEOUT = 30.0  # seconds of a call
CALM_SECONDS = 2.0  # before and after
BETWEEN_SECONDS = 0.2  # two calls of a caller
START_SECONDS = 60.0
CONFIGURATION = """
daemon off;
worker_processes 1;
pid {folder}/pid;
error_log {folder}/errors;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}/bodies;
    proxy_temp_path {folder}/proxied;
    upstream sopdeploy {{
        {servers}
        keepalive 32;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://sopdeploy;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $http_host;
        }}
    }}
}}
"""


@dataclass
class Calls:
    """Calls: how many had a result, the errors of the others, and the longest in seconds.

    `away` is how long the server did not respond, in seconds.
    """

    num_right: int = 0
    errors: list[str] = field(default_factory=list)
    longest: float = 0.0
    away: float = 0.0


class Server:
    """`sopdeploy serve` with the bundle *bundle* at an address of this machine, which can go away and come back."""

    def __init__(self, bundle: Path, host: str, port: int) -> None:
        self.host = host
        self._command = [sys.executable, "-m", "sopdeploy", "serve", str(bundle)]
        self._command += ["--host", host, "--port", str(port)]
        self._ready = f"http://{host}:{port}/readyz"

    def start(self) -> None:
        """Start the server, and wait until it is ready."""
        begin = time.monotonic()
        quiet = subprocess.DEVNULL
        names = {**os.environ, "SOPDEPLOY_ALLOWED_HOSTS": NAME}
        self._process = subprocess.Popen(self._command, env=names, stdout=quiet, stderr=quiet)
        wait_until_ready(self._ready)
        self.start_seconds = time.monotonic() - begin

    def kill(self) -> None:
        """End the server at once, in the middle of its requests."""
        self._process.kill()
        self._process.wait()


def wait_until_ready(url: str) -> None:
    """Wait until *url* responds with 200; raises `RuntimeError` after `START_SECONDS`."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        with suppress(httpx.TransportError):
            if httpx.get(url, timeout=2, trust_env=False).is_success:
                return
        time.sleep(0.05)
    raise RuntimeError(f"{url}: not ready after {START_SECONDS:.0f} s")


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def nginx(servers: Sequence[Server], port: int) -> Iterator[str]:
    """Run nginx in front of *servers*, which listen at *port*; yield its URL."""
    own = free_port()
    lines = (f"server {server.host}:{port} max_fails=0;" for server in servers)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # its worker may be another user
        text = CONFIGURATION.format(folder=folder, port=own, servers=" ".join(lines))
        (folder / "nginx.conf").write_text(text)

        command = ["nginx", "-c", f"{folder}/nginx.conf", "-e", f"{folder}/log"]
        process = subprocess.Popen(command)
        try:
            wait_until_ready(f"http://127.0.0.1:{own}/readyz")
            yield f"http://127.0.0.1:{own}"
        finally:
            process.terminate()
            process.wait()


@contextmanager
def named(servers: Sequence[Server], port: int) -> Iterator[str]:
    """Give all *servers* the name `NAME` in this process, as a name server would; yield their URL."""
    look_up = socket.getaddrinfo

    def resolve(host: Any, *arguments: Any, **options: Any) -> Any:
        if host not in (NAME, NAME.encode()):
            return look_up(host, *arguments, **options)
        kind = socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, ""
        return [(*kind, (server.host, port)) for server in servers]

    socket.getaddrinfo = resolve
    try:
        yield f"http://{NAME}:{port}"
    finally:
        socket.getaddrinfo = look_up


def call_until(stop: threading.Event, url: str, image: bytes, calls: Calls) -> None:
    """Classify *image* again and again."""
    with Client(url, timeout=TIMEOUT) as client:
        while not stop.wait(BETWEEN_SECONDS):
            start = time.monotonic()
            try:
                client.classify(image)
                calls.num_right += 1
            except ServiceError as error:
                calls.errors.append(str(error))
            calls.longest = max(calls.longest, time.monotonic() - start)


def measure(url: str, first: Server, image: bytes, away: float, num_callers: int) -> Calls:
    """Count the calls of *num_callers* while *first* is away for *away* seconds, or as long as it starts."""
    calls = [Calls() for _ in range(num_callers)]
    stop = threading.Event()
    callers = [
        threading.Thread(target=call_until, args=(stop, url, image, own)) for own in calls
    ]
    for caller in callers:
        caller.start()

    time.sleep(CALM_SECONDS)
    first.kill()
    left = time.monotonic()
    time.sleep(max(0.0, away - first.start_seconds))
    first.start()
    measured = time.monotonic() - left
    time.sleep(CALM_SECONDS)

    stop.set()
    for caller in callers:
        caller.join()
    return Calls(
        num_right=sum(one.num_right for one in calls),
        errors=[error for one in calls for error in one.errors],
        longest=max(one.longest for one in calls),
        away=measured,
    )


def numbers(text: str) -> list[int]:
    """Parse whole numbers with commas between them."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Measure all rows and print them; exit with 1 if a call was lost."""
    parser = make_parser(__doc__)
    parser.add_argument("bundle", type=existing)
    parser.add_argument("--away", type=numbers, default=[1, 2, 4, 15], help="seconds")
    parser.add_argument("--callers", type=numbers, default=[1, 8, 32])
    arguments = parser.parse_args()
    image = encode_image(np.full((375, 500, 3), 128, np.uint8))
    fronts = [named, nginx] if shutil.which("nginx") else [named]
    if nginx not in fronts:
        print("nginx is not installed: rows with nginx are left out", file=sys.stderr)

    results = []
    num_lost = 0
    for num_servers, front in product((1, 2), fronts):
        port = free_port()
        servers = [
            Server(arguments.bundle, f"127.0.0.{number + 1}", port)
            for number in range(num_servers)
        ]
        with ExitStack() as stack:
            for server in servers:
                server.start()
                stack.callback(server.kill)
            url = stack.enter_context(front(servers, port))

            for away, num_callers in product(arguments.away, arguments.callers):
                calls = measure(url, servers[0], image, away, num_callers)
                where = f"{num_servers} by {front.__name__}, {away} s, {num_callers} callers"
                num_lost += len(calls.errors)
                for error in sorted(set(calls.errors)):
                    print(f"{where}: {error}", file=sys.stderr)

                values = {
                    "lost": len(calls.errors),
                    "s away": calls.away,
                    "s of the longest call": calls.longest,
                }
                num_calls = calls.num_right + len(calls.errors)
                print(f"{where}: {num_calls} calls, {values}", file=sys.stderr, flush=True)
                results += [
                    Result(case=where, ours=value, unit=unit, runs=num_calls)
                    for unit, value in values.items()
                ]

    report(results, as_json=arguments.json)
    sys.exit(num_lost > 0)


if __name__ == "__main__":
    main()
