"""The clients of the soak test: what each sends again and again, and what it expects.

A client is a function that runs until it is cancelled; `MIX` lists all of them.
"""

import asyncio
import base64
import hashlib
import io
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from sopdeploy.base.files import atomic_write, move_link
from sopdeploy.bundle.decision import softmax

NAME = "soak"
SIZES = ((16, 16), (97, 61), (500, 375), (1600, 1200))
FLOOD, REQUESTS = 100, 48
PAUSE = 0.02
KILL_SECONDS = 7.0
NEW_STOPPED = 0.5  # share of the processes that replace a killed one
KEYS_SECONDS = 5.0  # after a reload, until all processes have the new keys
KEY_REQUESTS = 5
REPLACED = '\n[[key]]\nname = "replaced"\n'
RETRIES = 20  # of a request whose connection was lost
# Estimated from the queue; an engine that was killed. Clients may retry.
ALLOWED_5XX = {(503, "deadline_unreachable"), (503, "runtime_dead")}
CLOSE = 1e-5  # difference of probabilities: rounding depends on the batch size

Probabilities = Mapping[str, float]  # by label


def largest_difference(received: Probabilities, expected: Probabilities) -> float:
    """Return the largest difference of a probability; infinite for other labels."""
    if received.keys() != expected.keys():
        return float("inf")
    return max(abs(received[label] - expected[label]) for label in received)


@dataclass(slots=True)
class Tally:
    """Results of all requests; `failures` lists unexpected ones."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    compared: int = 0
    digests: set[str] = field(default_factory=set)  # of the bundles of compared responses
    worst: float = 0.0

    def note(self, kind: str, status: int, code: str = "", expected: int = 200) -> None:
        """Count a response; 429 is always allowed, a 5xx only if listed in ALLOWED_5XX."""
        self.outcomes[kind, f"{status} {code}".strip()] += 1
        if status not in {expected, 429} and (status, code) not in ALLOWED_5XX:
            self.failures.append(f"{kind}: {status} {code}, expected {expected}")

    def compare(self, kind: str, found: Probabilities, expected: Probabilities) -> None:
        """Compare a response with direct inference."""
        difference = largest_difference(found, expected)
        self.compared += 1
        self.worst = max(self.worst, difference)
        if not difference <= CLOSE:
            self.failures.append(f"{kind}: differs by {difference}")


class RepeatingTransport(httpx.AsyncHTTPTransport):
    """Repeats a request whose connection is lost, as it is if a process of the server is killed."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send *request*, up to `RETRIES` times; a body that is sent slowly is not repeated.

        If no response comes, returns the 503 of a server whose runtime has died.
        """
        for _ in range(RETRIES):
            with suppress(httpx.NetworkError, httpx.RemoteProtocolError, httpx.StreamConsumed):
                response = await super().handle_async_request(request)
                await response.aread()
                return response
            await asyncio.sleep(0.2)
            if not isinstance(request.stream, httpx.ByteStream):
                break
        headers = {"x-error-code": "runtime_dead"}
        return httpx.Response(
            503, json={"code": "runtime_dead"}, headers=headers, request=request
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """The server, valid request bodies, and the expected probabilities by bundle digest and image.

    *labels* are all classes in order, *classes* is the number of compared ones. The server
    follows *link*, which is moved to *bundles*.
    """

    url: str
    bodies: Mapping[str, bytes]
    expected: Mapping[str, Mapping[str, Probabilities]]
    tally: Tally
    classes: int
    labels: Sequence[str]
    link: Path
    bundles: Sequence[Path]
    pid: int  # of the server
    keys: Path  # the file with the API keys
    secret: str  # the key that stays
    kill: bool = False  # whether children of the server are killed

    def client(self) -> httpx.AsyncClient:
        """Open a client of the server, with the key that stays."""
        limits = httpx.Limits(max_connections=FLOOD)
        transport = httpx.AsyncHTTPTransport(limits=limits)
        if self.kill:
            transport = RepeatingTransport(limits=limits)
        headers = {"X-API-Key": self.secret}
        return httpx.AsyncClient(
            base_url=self.url, timeout=60, transport=transport, headers=headers
        )

    def draw(self, rng: random.Random, count: int) -> list[tuple[str, bytes]]:
        """Draw valid bodies with their names."""
        return [(name, self.bodies[name]) for name in rng.choices(sorted(self.bodies), k=count)]

    async def check(
        self,
        kind: str,
        reply: httpx.Response,
        names: Sequence[str],
        found: Sequence[Probabilities],
    ) -> None:
        """Count *reply*, and compare *found*, its probabilities for the images *names*."""
        self.tally.note(kind, reply.status_code, error_code(reply))
        if reply.status_code == 200:
            digest = reply.headers["x-model-digest"]
            self.tally.digests.add(digest)
            for name, probabilities in zip(names, found, strict=True):
                if not probabilities and self.kill:
                    continue  # an image of a list, whose engine was killed
                self.tally.compare(kind, probabilities, self.expected[digest][name])
        await asyncio.sleep(PAUSE if reply.status_code == 200 else 0.5)


def error_code(reply: httpx.Response) -> str:
    """Read the code of an error; empty for an answer without one."""
    if "problem+json" in reply.headers.get("content-type", ""):
        return str(reply.json()["code"])
    return reply.headers.get("x-error-code", "")


def probabilities(reply: httpx.Response) -> list[dict[str, float]]:
    """Read the probabilities by label of each image in a v1 response; empty for an image that failed."""
    document = reply.json()
    results = document.get("results", [document])
    return [
        {item["label"]: item["probability"] for item in one.get("classes", ())}
        for one in results
    ]


def valid_bodies() -> dict[str, bytes]:
    """Create two JPEGs of each size."""
    bodies = {}
    for width, height in SIZES:
        for seed in (0, 1):
            rng = np.random.default_rng(seed)
            pixels = rng.integers(
                0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8
            )
            file = io.BytesIO()
            Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(
                file, "JPEG"
            )
            bodies[f"{width}x{height}-{seed}.jpg"] = file.getvalue()
    return bodies


INVALID: Sequence[tuple[bytes, str, int]] = (  # body, content type, expected status
    (b"", "image/jpeg", 400),
    (b"text, not an image", "image/jpeg", 415),
    (b"\xff\xd8\xff\xe0 not a JPEG", "image/jpeg", 422),
    (b"--x\r\ndamaged", "multipart/form-data; boundary=x", 400),
    (b"", "multipart/mixed; boundary=x", 415),
)


async def single_images(scenario: Scenario, rng: random.Random) -> None:
    """Send an image as the body, every third time within two seconds, and compare the response."""
    parameters = {"top_k": scenario.classes}
    async with scenario.client() as client:
        while True:
            ((name, body),) = scenario.draw(rng, 1)
            slow = rng.random() < 1 / 3
            content, headers = (
                pieces(body) if slow else body,
                {"Content-Length": str(len(body))},
            )
            reply = await client.post(
                "/v1/classify", content=content, headers=headers, params=parameters
            )
            await scenario.check(
                "slow" if slow else "single", reply, [name], probabilities(reply)
            )


async def pieces(body: bytes) -> AsyncIterator[bytes]:
    """Yield *body* in ten pieces within two seconds."""
    size = len(body) // 10 + 1
    for start in range(0, len(body), size):
        yield body[start : start + size]
        await asyncio.sleep(0.2)


async def forms(scenario: Scenario, rng: random.Random) -> None:
    """Send three images in a form, one of them invalid, and compare the others."""
    async with scenario.client() as client:
        while True:
            (first, image), (last, other) = scenario.draw(rng, 2)
            files = [("image", body) for body in (image, b"no image", other)]
            reply = await client.post(
                "/v1/classify", files=files, params={"top_k": scenario.classes}
            )
            await scenario.check("form", reply, [first, last], probabilities(reply)[::2])


async def json_bodies(scenario: Scenario, rng: random.Random) -> None:
    """Send one to three images as base64 and compare each result."""
    async with scenario.client() as client:
        while True:
            sent = scenario.draw(rng, rng.randint(1, 3))
            images = [base64.b64encode(body).decode("ascii") for _, body in sent]
            parameters = {"top_k": scenario.classes}
            reply = await client.post(
                "/v1/classify", json={"images": images}, params=parameters
            )
            await scenario.check(
                "json", reply, [name for name, _ in sent], probabilities(reply)
            )


async def inference_protocol(scenario: Scenario, rng: random.Random) -> None:
    """Request the logits of one or two images with the protocol and compare their softmax."""
    async with scenario.client() as client:
        while True:
            sent, found = scenario.draw(rng, rng.randint(1, 2)), []
            data = [base64.b64encode(body).decode("ascii") for _, body in sent]
            tensor = {"name": "IMAGE", "datatype": "BYTES", "shape": [len(sent)], "data": data}
            request = {"inputs": [tensor], "outputs": [{"name": "logits"}]}
            reply = await client.post(f"/v2/models/{NAME}/infer", json=request)
            if reply.status_code == 200:
                (output,) = reply.json()["outputs"]
                for logits in np.array(output["data"], dtype=np.float32).reshape(
                    output["shape"]
                ):
                    ranked = sorted(
                        zip(softmax(logits).tolist(), scenario.labels, strict=True),
                        reverse=True,
                    )
                    found.append({label: value for value, label in ranked[: scenario.classes]})
            await scenario.check("v2", reply, [name for name, _ in sent], found)


async def model_swaps(scenario: Scenario, rng: random.Random) -> None:
    """Move the link that the server follows to another bundle every few seconds."""
    async with scenario.client() as client:
        while True:
            await asyncio.sleep(1 + 2 * rng.random())
            index = (scenario.tally.outcomes["swap", "200"] + 1) % len(scenario.bundles)
            move_link(scenario.link, str(scenario.bundles[index]))
            ready = await client.get(f"/v2/models/{NAME}/ready")
            code = "runtime_dead" if scenario.kill and ready.status_code == 503 else ""
            scenario.tally.note("swap", ready.status_code, code)


async def invalid_images(scenario: Scenario, rng: random.Random) -> None:
    """Send invalid bodies; the response must have the expected status."""
    async with scenario.client() as client:
        while True:
            body, kind, status = rng.choice(INVALID)
            reply = await client.post(
                "/v1/classify", content=body, headers={"Content-Type": kind}
            )
            scenario.tally.note("bad", reply.status_code, reply.json()["code"], expected=status)
            await asyncio.sleep(PAUSE)


async def disconnecting(scenario: Scenario, rng: random.Random) -> None:
    """Disconnect within a body, or before the response."""
    url = httpx.URL(scenario.url)
    while True:
        ((_, body),) = scenario.draw(rng, 1)
        sent = rng.choice((len(body) // 2, len(body)))
        head = (
            f"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {scenario.secret}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        _, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(head.encode() + body[:sent])
        with suppress(ConnectionError):
            await writer.drain()
        await asyncio.sleep(rng.random() * PAUSE)
        writer.transport.abort()
        scenario.tally.outcomes[
            "left", "while waiting" if sent == len(body) else "in the body"
        ] += 1
        await asyncio.sleep(5 * PAUSE)


async def floods(scenario: Scenario, rng: random.Random) -> None:
    """Every few seconds, send more images than the queue holds, of which some get 429; then ask for metrics."""
    while True:
        await asyncio.sleep(4 + 2 * rng.random())
        ((_, body),) = scenario.draw(rng, 1)
        async with scenario.client() as client:
            replies = await asyncio.gather(
                *(client.post("/v1/classify", content=body) for _ in range(FLOOD))
            )
            pages = await asyncio.gather(*(client.get("/metrics") for _ in range(FLOOD)))
        for reply in replies:
            scenario.tally.note("flood", reply.status_code, reply.json().get("code", ""))
        for page in pages:
            scenario.tally.note("flood of /metrics", page.status_code, error_code(page))


async def monitoring(scenario: Scenario, _: random.Random) -> None:
    """Request the health endpoints as a supervisor does."""
    async with scenario.client() as client:
        while True:
            for path in ("/livez", "/readyz", "/metrics", "/info"):
                reply = await client.get(path)
                status = reply.status_code
                is_starting = path == "/readyz" and scenario.kill
                scenario.tally.note(
                    path,
                    status,
                    error_code(reply),
                    expected=503 if is_starting and status == 503 else 200,
                )
            await asyncio.sleep(1)


async def kills(scenario: Scenario, rng: random.Random) -> None:
    """End or stop a child of the supervisor now and then; a stopped one is killed by the supervisor.

    The process that replaces it is sometimes stopped, too, before its first report.
    """
    file = Path(f"/proc/{scenario.pid}/task/{scenario.pid}/children")
    while True:
        await asyncio.sleep(KILL_SECONDS)
        if not scenario.kill:
            continue

        before = {*file.read_text().split()}
        number = rng.choice((signal.SIGKILL, signal.SIGSTOP))
        with suppress(ProcessLookupError):
            os.kill(int(rng.choice(sorted(before))), number)
            scenario.tally.note(f"kill {number.name}", 200)

        if number == signal.SIGKILL and rng.random() < NEW_STOPPED:
            deadline = time.monotonic() + KILL_SECONDS
            while time.monotonic() < deadline and not {*file.read_text().split()} - before:
                await asyncio.sleep(0.001)
            for pid in {*file.read_text().split()} - before:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGSTOP)
                    scenario.tally.note("kill SIGSTOP before the first report", 200)


async def new_keys(scenario: Scenario, rng: random.Random) -> None:
    """Replace an API key every few seconds; soon all processes accept the new one, and refuse the old one."""
    first_tables = scenario.keys.read_text().partition(REPLACED)[0]
    old = ""
    while True:
        # Write the key that stays, and another one; the server reads them at SIGHUP.
        new = f"sop_{rng.getrandbits(128):x}"
        sha256 = hashlib.sha256(new.encode()).hexdigest()
        with atomic_write(scenario.keys) as partial:
            partial.write_text(f'{first_tables}{REPLACED}sha256 = "{sha256}"\n')
        os.kill(scenario.pid, signal.SIGHUP)

        # Each request opens a connection, so that it may reach any process.
        await asyncio.sleep(KEYS_SECONDS)
        for secret, expected in ((new, 200), (old, 401)):
            for _ in range(KEY_REQUESTS):
                async with scenario.client() as client:
                    headers = {"X-API-Key": secret}
                    status = (await client.get("/v1/card", headers=headers)).status_code
                code = "runtime_dead" if scenario.kill and status == 503 else ""
                scenario.tally.note("key", status, code, expected=expected)
        old = new


MIX: Sequence[Callable[[Scenario, random.Random], Coroutine[Any, Any, None]]] = (
    *[single_images] * 5, forms, json_bodies, inference_protocol, model_swaps, invalid_images,
    disconnecting, floods, monitoring, new_keys, kills,
)  # fmt: skip


async def load(scenario: Scenario, seconds: float, seed: int) -> None:
    """Run all clients for *seconds*, then close their connections."""
    tasks = [
        asyncio.create_task(client(scenario, random.Random(seed + number)))  # noqa: S311 - not a secret
        for number, client in enumerate(MIX)
    ]
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    scenario.tally.failures += [f"a client failed: {task.exception()!r}" for task in done]


async def start_all_threads(scenario: Scenario) -> None:
    """Send so many requests at once that the server starts all its threads."""
    image = base64.b64encode(min(scenario.bodies.values(), key=len)).decode("ascii")
    files = [("image", body) for body in scenario.bodies.values()]
    async with scenario.client() as client:
        requests = [client.post("/v1/classify", json={"image": image}) for _ in range(REQUESTS)]
        await asyncio.gather(*requests, *(client.get("/v1/card") for _ in range(REQUESTS)))
        (await client.post("/v1/classify", files=files)).raise_for_status()
