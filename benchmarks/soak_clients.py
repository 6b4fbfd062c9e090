"""The soak's clients: good ones, bad ones, slow ones, ones that leave. Each runs until it is cancelled."""

import asyncio
import io
import json
import random
import struct
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from PIL import Image
from soak_accounts import Tally

from sopdeploy.client import AsyncClient, ClassProbability
from sopdeploy.errors import ServiceError

SIZES = ((16, 16), (97, 61), (500, 375), (1600, 1200))
FLOOD = 100
REST = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Ground:
    """Where the clients play: the server, the good bodies, and what each bundle, by digest, says to them.

    *labels* are all classes in order, *classes* how many are compared, *folders* the bundles to be swapped.
    """

    url: str
    bodies: Mapping[str, bytes]
    expected: Mapping[str, Mapping[str, Mapping[str, float]]]
    tally: Tally
    classes: int
    labels: Sequence[str] = ()
    folders: Sequence[str] = ()

    def compare(self, kind: str, digest: str, name: str, found: Sequence[ClassProbability]) -> None:
        """Compare what the bundle *digest* said to the picture *name* with that bundle's own numbers."""
        if digest not in self.expected:
            self.tally.fail(f"{kind}: answered by {digest!r}, which is no bundle of this soak")
            return
        self.tally.by_digest[digest] += 1
        self.tally.compare(kind, found, self.expected[digest][name])

    def any(self, chance: random.Random) -> tuple[str, bytes]:
        """Return one of the good bodies with its name."""
        name = chance.choice(sorted(self.bodies))
        return name, self.bodies[name]


def good_bodies() -> dict[str, bytes]:
    """Return pictures of several sizes, two of each, as JPEG."""
    found = {}
    for width, height in SIZES:
        for seed in (0, 1):
            rng = np.random.default_rng(seed)
            pixels = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG")
            found[f"{width}x{height}-{seed}.jpg"] = file.getvalue()
    return found


def bad_bodies(good: bytes) -> list[tuple[bytes, str, int]]:
    """Return bodies that are none, their content type and the status that tells so."""
    return [
        (b"", "image/jpeg", 400),
        (b"text, not a picture", "image/jpeg", 415),
        (good[: len(good) // 2], "image/jpeg", 422),
        (huge_png(), "image/png", 413),
        (b"--x\r\ndamaged", "multipart/form-data; boundary=x", 400),
        (b"", "multipart/mixed; boundary=x", 415),
    ]


def huge_png() -> bytes:
    """Return a few bytes that announce 900 million pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, b"IDAT")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


async def one_by_one(ground: Ground, chance: random.Random) -> None:
    """Send a picture as the body and compare the answer."""
    async with AsyncClient(ground.url, retries=0) as client:
        while True:
            name, body = ground.any(chance)
            try:
                found = await client.classify(body, top_k=ground.classes)
            except ServiceError as problem:
                ground.tally.note("single", problem.status, problem.code)
                await asyncio.sleep(0.5)
            else:
                ground.tally.note("single", 200)
                ground.compare("single", found.model_digest, name, found.classes)


async def forms(ground: Ground, chance: random.Random) -> None:
    """Send three pictures in a form, now and then a bad one among them, and compare each answer."""
    async with AsyncClient(ground.url, retries=0) as client:
        while True:
            sent: list[tuple[str | None, bytes]] = [ground.any(chance) for _ in range(3)]
            if chance.random() < 0.5:
                sent[1] = (None, b"no picture")
            try:
                found = await client.classify([body for _, body in sent], top_k=ground.classes)
            except ServiceError as problem:
                ground.tally.note("form", problem.status, problem.code)
                await asyncio.sleep(0.5)
                continue
            for (name, _), result in zip(sent, found, strict=True):
                ground.tally.note(
                    "form", result.error.status if result.error else 200, wanted=[200 if name else 415]
                )
                if name is not None:
                    ground.compare("form", result.model_digest, name, result.classes)
            await asyncio.sleep(REST)


async def bad(ground: Ground, chance: random.Random) -> None:
    """Send what is no picture; the answer must say what is wrong."""
    bodies = bad_bodies(next(iter(ground.bodies.values())))
    async with httpx.AsyncClient(base_url=ground.url, timeout=30) as client:
        while True:
            body, kind, status = chance.choice(bodies)
            reply = await client.post("/v1/classify", content=body, headers={"Content-Type": kind})
            ground.tally.note("bad", reply.status_code, reply.json()["code"], wanted=[status])
            await asyncio.sleep(REST)


async def leaving(ground: Ground, chance: random.Random) -> None:
    """Hang up in the middle of a body, or before the answer."""
    while True:
        _, body = ground.any(chance)
        waits = chance.random() < 0.5
        async with connected(ground.url) as (_, writer):
            writer.write(head(len(body)) + (body if waits else body[: len(body) // 2]))
            with suppress(ConnectionError):
                await writer.drain()
            await asyncio.sleep(chance.random() * 0.02)
        ground.tally.outcomes["left", "while waiting" if waits else "in the body"] += 1
        await asyncio.sleep(5 * REST)


async def slow(ground: Ground, chance: random.Random) -> None:
    """Send a body in ten pieces within two seconds and compare the answer."""
    while True:
        name, body = ground.any(chance)
        async with connected(ground.url) as (reader, writer):
            writer.write(head(len(body), ground.classes))
            status, answer, digest = await piecewise(reader, writer, body)
        ground.tally.note("slow", status, answer.get("code", ""))
        if status == 200:
            classes = [ClassProbability(**item) for item in answer["classes"]]
            ground.compare("slow", digest, name, classes)


async def piecewise(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes
) -> tuple[int, dict[str, Any], str]:
    """Send *body* in ten pieces, or until the answer comes; return status, document and digest."""
    answered = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
    try:
        piece = len(body) // 10 + 1
        for start in range(0, len(body), piece):
            if answered.done():
                break  # a server may refuse before it has read the body
            writer.write(body[start : start + piece])
            await writer.drain()
            await asyncio.wait({answered}, timeout=0.2)
        top = (await answered).lower()
    finally:
        answered.cancel()
    length = int(top.partition(b"content-length:")[2].partition(b"\r\n")[0])
    digest = top.partition(b"x-model-digest:")[2].partition(b"\r\n")[0].strip().decode("ascii")
    return int(top[9:12]), json.loads(await reader.readexactly(length)), digest


async def flood(ground: Ground, chance: random.Random) -> None:
    """Now and then send far more than the queue holds; what is refused is refused with 429."""
    limits = httpx.Limits(max_connections=FLOOD)
    while True:
        await asyncio.sleep(4 + 2 * chance.random())
        _, body = ground.any(chance)
        async with httpx.AsyncClient(base_url=ground.url, timeout=60, limits=limits) as client:
            replies = await asyncio.gather(*(client.post("/v1/classify", content=body) for _ in range(FLOOD)))
        for reply in replies:
            ground.tally.note("flood", reply.status_code, reply.json().get("code", ""))


async def watching(ground: Ground, chance: random.Random) -> None:  # noqa: ARG001 - as the others
    """Ask how the server is, as a supervisor does."""
    async with httpx.AsyncClient(base_url=ground.url, timeout=30) as client:
        while True:
            for path in ("/livez", "/readyz", "/metrics", "/info"):
                ground.tally.note(path, (await client.get(path)).status_code)
            await asyncio.sleep(1)


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Give a raw connection to the server at *url*, and cut it at the end."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


def head(length: int, classes: int = 1) -> bytes:
    """Return the head of a request whose body has *length* bytes."""
    request = f"POST /v1/classify?top_k={classes} HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n"
    return f"{request}Content-Length: {length}\r\n\r\n".encode()
