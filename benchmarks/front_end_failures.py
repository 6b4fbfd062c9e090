"""Requests lost and time to recovery when processes of a server with two sandboxed front ends fail.

    python benchmarks/front_end_failures.py --rounds 50 --json

In every round, 24 connections have a request in flight; batches are simulated and take 0.2 s. Unlike in a
real server, restarts are not delayed after several deaths within a minute.

- `front end killed`: connections lost minus those that the front end held (limit: 0), seconds until its
  replacement is ready (limit: 3), growth of the inference process and of the supervisor over the rounds.
- `inference process killed`: milliseconds until the last request has its 503 with Retry-After (limit: 100).
- `inference process stopped` (SIGSTOP): seconds until the first 503, milliseconds from the first to the last
  (limit: 100).
- `back`: seconds until a request gets 200 again.
"""

import asyncio
import os
import signal
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from measure import Result, make_parser, report
from simulated_server import Server, running
from soak_accounts import Resources, read_resources

SETTINGS = {"front_ends": 2, "sandbox": "required"}
BATCH = "200,0,32"
CONNECTIONS = 24
BODY = b"\xff\xd8\xff"  # the decoder is simulated
HEAD = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(BODY)
ESTABLISHED = "01"  # in /proc/net/tcp

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True)
class Answer:
    """The status of a response, 0 if the connection was lost, and the moment of `time.monotonic`."""

    status: int
    retry_after: bool
    moment: float


@dataclass(frozen=True, slots=True)
class Failure:
    """The effects of one failure.

    *held* is the number of connections of the failed process, *lost* the number of all connections that
    ended. *back* and the moments of *answers* are seconds after the failure.
    """

    answers: list[Answer]
    held: int
    lost: int
    back: float


async def send(connection: Connection) -> Answer:
    """Send one request and read its response."""
    reader, writer = connection
    try:
        writer.write(HEAD + BODY)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = int(head.partition("content-length:")[2].partition("\r\n")[0])
        await reader.readexactly(length)
    except (ConnectionError, asyncio.IncompleteReadError):
        return Answer(0, False, time.monotonic())
    return Answer(int(head.split(" ", 2)[1]), "retry-after:" in head, time.monotonic())


def held_by(process: int, port: int) -> int:
    """Count the connections to *port* that *process* has open."""
    inodes = set()
    for file in Path(f"/proc/{process}/fd").iterdir():
        try:
            inodes.add(str(file.readlink()))
        except OSError:
            continue
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(
        row[3] == ESTABLISHED
        and int(row[1].rpartition(":")[2], 16) == port
        and f"socket:[{row[9]}]" in inodes
        for row in rows
    )


async def fail(
    server: Server, victim: int, signal_number: int, is_back: Callable[[], Awaitable[bool]]
) -> Failure:
    """Send a signal to the process *victim* while all connections have a request in flight."""
    parts = urlsplit(server.url)
    connections = [await asyncio.open_connection(parts.hostname, parts.port) for _ in range(CONNECTIONS)]
    warm = await asyncio.gather(*map(send, connections))
    if {answer.status for answer in warm} != {200}:
        raise SystemExit(f"the server does not respond: {warm[0]}")
    held = held_by(victim, int(parts.port or 0))
    requests = [asyncio.create_task(send(connection)) for connection in connections]
    await asyncio.sleep(0.05)  # a quarter of a batch
    os.kill(victim, signal_number)
    began = time.monotonic()
    answers = await asyncio.gather(*requests)
    later = await asyncio.gather(*map(send, connections))  # a response may predate the failure
    while not await is_back():
        await asyncio.sleep(0.02)
    back = time.monotonic() - began
    for _, writer in connections:
        writer.close()
    relative = [replace(answer, moment=answer.moment - began) for answer in answers]
    return Failure(relative, held, sum(answer.status == 0 for answer in later), back)


async def kill_front_end(server: Server, number: int) -> Failure:
    """Kill one of the front ends."""
    victim = server.processes()[number % 2]

    async def is_back() -> bool:
        up = server.samples("sopdeploy_worker_up")
        return victim not in server.processes() and list(up.values()) == [1.0, 1.0]

    return await fail(server, victim, signal.SIGKILL, is_back)


async def end_inference(server: Server, signal_number: int) -> Failure:
    """Kill or stop the inference process; the supervisor kills a stopped one."""
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:

        async def is_back() -> bool:
            try:
                return (await client.post("/v1/classify", content=BODY)).status_code == 200
            except httpx.TransportError:  # accepted by a front end that ends
                return False

        return await fail(server, server.processes(inference=True)[0], signal_number, is_back)


def resources(server: Server) -> tuple[Resources, Resources]:
    """Read the resources of the inference process and the supervisor."""
    (inference,) = server.processes(inference=True)
    return read_resources(inference), read_resources(server.child.pid)


def front_ends_killed(server: Server, rounds: int) -> list[Result]:
    """Kill a front end in each of *rounds* rounds, after two rounds that are not counted."""
    for number in range(2):
        asyncio.run(kill_front_end(server, number))
    before = resources(server)
    failures = [asyncio.run(kill_front_end(server, number)) for number in range(rounds)]
    after = resources(server)
    values: dict[str, tuple[float, str]] = {
        "connections lost, less those held": (
            sum(abs(failure.lost - failure.held) for failure in failures),
            "connections",
        ),
        "requests with an error": (
            sum(answer.status not in {0, 200} for failure in failures for answer in failure.answers),
            "requests",
        ),
        "replaced, median": (statistics.median(failure.back for failure in failures), "s"),
    }
    names = ("inference process", "supervisor")
    for name, first, last in zip(names, before, after, strict=True):
        values[f"growth of the {name}'s memory"] = (last.resident - first.resident) / 1e6, "MB"
        values[f"growth of the {name}'s descriptors"] = last.descriptors - first.descriptors, ""
        values[f"growth of the {name}'s threads"] = last.threads - first.threads, ""
    results = [
        Result(case=f"front end killed: {name}", ours=value, unit=unit, runs=rounds)
        for name, (value, unit) in values.items()
    ]
    slowest = max(failure.back for failure in failures)
    return [limited("front end killed: replaced, slowest", slowest, 3.0, "s", rounds), *results]


def inference_ended(server: Server, number: int, rounds: int) -> list[Result]:
    """Kill (SIGKILL) or stop (SIGSTOP) the inference process in *rounds* rounds."""
    failures = [asyncio.run(end_inference(server, number)) for _ in range(rounds)]
    stopped = number == signal.SIGSTOP
    case = "inference process stopped: " if stopped else "inference process killed: "
    moments = [sorted(answer.moment for answer in failure.answers) for failure in failures]
    noticed = [times[0] if stopped else 0.0 for times in moments]
    settled = max(times[-1] - start for times, start in zip(moments, noticed, strict=True))
    wrong = sum(
        answer.status != 503 or not answer.retry_after for failure in failures for answer in failure.answers
    )
    back = statistics.median(failure.back for failure in failures)
    results = [
        limited(case + "last request settled, slowest", 1000 * settled, 100.0, "ms", rounds),
        Result(case=case + "requests without 503 and Retry-After", ours=wrong, unit="requests", runs=rounds),
        Result(case=case + "back", ours=back, unit="s", runs=rounds),
    ]
    if stopped:
        results.append(Result(case=case + "noticed", ours=statistics.median(noticed), unit="s", runs=rounds))
    return results


def limited(case: str, value: float, limit: float, unit: str, runs: int) -> Result:
    """Build the result of a value with a limit."""
    return Result(case=case, against="limit", ours=value, other=limit, unit=unit, runs=runs)


def measure(rounds: int, engine_rounds: int) -> list[Result]:
    """Measure all failures on one server."""
    with running(SETTINGS, BATCH) as server:
        return [
            *front_ends_killed(server, rounds),
            *inference_ended(server, signal.SIGKILL, engine_rounds),
            *inference_ended(server, signal.SIGSTOP, engine_rounds),
        ]


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=50, help="rounds in which a front end is killed")
    parser.add_argument("--engine-rounds", type=int, default=5)
    arguments = parser.parse_args()
    results = measure(arguments.rounds, arguments.engine_rounds)
    report(results, as_json=arguments.json, load=os.getloadavg()[0])


if __name__ == "__main__":
    main()
