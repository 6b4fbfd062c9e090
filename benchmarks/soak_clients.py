"""Clients of the soak test: valid, invalid, slow and disconnecting; each runs until it is canceled."""

import asyncio
import io
import json
import random
import struct
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from PIL import Image
from soak_accounts import Tally

from sopdeploy.client import ClassProbability

SIZES = ((16, 16), (97, 61), (500, 375), (1600, 1200))
FLOOD = 100
PAUSE = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """The server, valid request bodies, and the expected probabilities by bundle digest and image.

    *labels* are all classes in order, *classes* is the number of compared ones. The server follows *link*,
    which is moved to *bundles*, if any.
    """

    url: str
    bodies: Mapping[str, bytes]
    expected: Mapping[str, Mapping[str, Mapping[str, float]]]
    tally: Tally
    classes: int
    labels: Sequence[str]
    link: Path
    bundles: Sequence[Path]

    def compare(self, kind: str, digest: str, name: str, classes: Sequence[ClassProbability]) -> None:
        """Compare the response of the bundle *digest* to the image *name* with the expected one."""
        if digest not in self.expected:
            self.tally.fail(f"{kind}: unknown bundle {digest!r}")
            return
        self.tally.by_digest[digest] += 1
        self.tally.compare(kind, classes, self.expected[digest][name])

    def choose_body(self, rng: random.Random) -> tuple[str, bytes]:
        """Choose a valid body; return its name and the body."""
        name = rng.choice(sorted(self.bodies))
        return name, self.bodies[name]


def valid_bodies() -> dict[str, bytes]:
    """Create two JPEGs of each size."""
    bodies = {}
    for width, height in SIZES:
        for seed in (0, 1):
            rng = np.random.default_rng(seed)
            pixels = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG")
            bodies[f"{width}x{height}-{seed}.jpg"] = file.getvalue()
    return bodies


def invalid_bodies(valid: bytes) -> list[tuple[bytes, str, int]]:
    """Create invalid bodies with their content type and expected status."""
    return [
        (b"", "image/jpeg", 400),
        (b"text, not an image", "image/jpeg", 415),
        (valid[: len(valid) // 2], "image/jpeg", 422),
        (huge_png(), "image/png", 413),
        (b"--x\r\ndamaged", "multipart/form-data; boundary=x", 400),
        (b"", "multipart/mixed; boundary=x", 415),
    ]


def huge_png() -> bytes:
    """Create a small PNG file whose header declares 900 million pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, b"IDAT")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


async def single_images(scenario: Scenario, rng: random.Random) -> None:
    """Send an image as the body and compare the response."""
    async with httpx.AsyncClient(base_url=scenario.url, timeout=60) as client:
        while True:
            name, body = scenario.choose_body(rng)
            reply = await client.post("/v1/classify", content=body, params={"top_k": scenario.classes})
            document = reply.json()
            scenario.tally.note("single", reply.status_code, document.get("code", ""))
            if reply.status_code == 200:
                classes = [ClassProbability(**item) for item in document["classes"]]
                scenario.compare("single", reply.headers["x-model-digest"], name, classes)
            else:
                await asyncio.sleep(0.5)


async def forms(scenario: Scenario, rng: random.Random) -> None:
    """Send three images in a form, sometimes one of them invalid, and compare each result."""
    async with httpx.AsyncClient(base_url=scenario.url, timeout=60) as client:
        while True:
            sent: list[tuple[str | None, bytes]] = [scenario.choose_body(rng) for _ in range(3)]
            if rng.random() < 0.5:
                sent[1] = (None, b"no image")
            files = [("image", body) for _, body in sent]
            reply = await client.post("/v1/classify", files=files, params={"top_k": scenario.classes})
            document = reply.json()
            if reply.status_code != 200:
                scenario.tally.note("form", reply.status_code, document["code"])
                await asyncio.sleep(0.5)
                continue
            for (name, _), result in zip(sent, document["results"], strict=True):
                status = result["error"]["status"] if "error" in result else 200
                scenario.tally.note("form", status, expected=[200 if name else 415])
                if name is not None:
                    classes = [ClassProbability(**item) for item in result["classes"]]
                    scenario.compare("form", reply.headers["x-model-digest"], name, classes)
            await asyncio.sleep(PAUSE)


async def invalid_images(scenario: Scenario, rng: random.Random) -> None:
    """Send invalid bodies; the response must have the expected status."""
    bodies = invalid_bodies(next(iter(scenario.bodies.values())))
    async with httpx.AsyncClient(base_url=scenario.url, timeout=30) as client:
        while True:
            body, kind, status = rng.choice(bodies)
            reply = await client.post("/v1/classify", content=body, headers={"Content-Type": kind})
            scenario.tally.note("bad", reply.status_code, reply.json()["code"], expected=[status])
            await asyncio.sleep(PAUSE)


async def disconnecting(scenario: Scenario, rng: random.Random) -> None:
    """Disconnect within a body, or before the response."""
    while True:
        _, body = scenario.choose_body(rng)
        complete = rng.random() < 0.5
        async with connected(scenario.url) as (_, writer):
            writer.write(head(len(body)) + (body if complete else body[: len(body) // 2]))
            with suppress(ConnectionError):
                await writer.drain()
            await asyncio.sleep(rng.random() * 0.02)
        scenario.tally.outcomes["left", "while waiting" if complete else "in the body"] += 1
        await asyncio.sleep(5 * PAUSE)


async def slow_bodies(scenario: Scenario, rng: random.Random) -> None:
    """Send a body in ten pieces within two seconds and compare the response."""
    while True:
        name, body = scenario.choose_body(rng)
        async with connected(scenario.url) as (reader, writer):
            writer.write(head(len(body), scenario.classes))
            status, document, digest = await piecewise(reader, writer, body)
        scenario.tally.note("slow", status, document.get("code", ""))
        if status == 200:
            classes = [ClassProbability(**item) for item in document["classes"]]
            scenario.compare("slow", digest, name, classes)


async def piecewise(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes
) -> tuple[int, dict[str, Any], str]:
    """Send *body* in ten pieces or until the response arrives; return status, JSON body and digest."""
    response = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
    try:
        piece = len(body) // 10 + 1
        for start in range(0, len(body), piece):
            if response.done():
                break  # the server may reject the request before it has read the body
            writer.write(body[start : start + piece])
            await writer.drain()
            await asyncio.wait({response}, timeout=0.2)
        top = (await response).lower()
    finally:
        response.cancel()
    length = int(top.partition(b"content-length:")[2].partition(b"\r\n")[0])
    digest = top.partition(b"x-model-digest:")[2].partition(b"\r\n")[0].strip().decode("ascii")
    return int(top[9:12]), json.loads(await reader.readexactly(length)), digest


async def floods(scenario: Scenario, rng: random.Random) -> None:
    """Every few seconds, send more requests than the queue holds; the excess must be rejected with 429."""
    limits = httpx.Limits(max_connections=FLOOD)
    while True:
        await asyncio.sleep(4 + 2 * rng.random())
        _, body = scenario.choose_body(rng)
        async with httpx.AsyncClient(base_url=scenario.url, timeout=60, limits=limits) as client:
            replies = await asyncio.gather(*(client.post("/v1/classify", content=body) for _ in range(FLOOD)))
        for reply in replies:
            scenario.tally.note("flood", reply.status_code, reply.json().get("code", ""))


async def monitoring(scenario: Scenario, rng: random.Random) -> None:  # noqa: ARG001 - the signature of all clients
    """Request the health endpoints as a supervisor does."""
    async with httpx.AsyncClient(base_url=scenario.url, timeout=30) as client:
        while True:
            for path in ("/livez", "/readyz", "/metrics", "/info"):
                scenario.tally.note(path, (await client.get(path)).status_code)
            await asyncio.sleep(1)


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a raw connection to the server at *url* and abort it after the block."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


def head(length: int, classes: int = 1) -> bytes:
    """Build the head of a request with a body of *length* bytes."""
    request = f"POST /v1/classify?top_k={classes} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    return f"{request}Content-Length: {length}\r\n\r\n".encode()
