"""More of the soak's clients: JSON, the Open Inference Protocol, and an operator who swaps models.

Every answer names the bundle that gave it and is compared with that bundle's own numbers.
"""

import asyncio
import base64
import random
from typing import Any

import httpx
import numpy as np
from soak_clients import REST, Ground

from sopdeploy.client import ClassProbability

NAME = "soak"
CROWD = 48


async def json_bodies(ground: Ground, chance: random.Random) -> None:
    """Send one to three pictures as base64 and compare each answer."""
    async with httpx.AsyncClient(base_url=ground.url, timeout=60) as client:
        while True:
            sent = [ground.any(chance) for _ in range(chance.randint(1, 3))]
            body = {"images": [text_of(body) for _, body in sent], "top_k": ground.classes}
            reply = await client.post("/v1/classify", json=body)
            answer = reply.json()
            ground.tally.note("json", reply.status_code, answer.get("code", ""))
            for (name, _), result in zip(sent, answer.get("results", ()), strict=False):
                classes = [ClassProbability(**item) for item in result["classes"]]
                ground.compare("json", reply.headers["x-model-digest"], name, classes)
            await asyncio.sleep(REST if reply.status_code == 200 else 0.5)


async def protocol(ground: Ground, chance: random.Random) -> None:
    """Ask for the logits of one or two pictures in the protocol and compare their softmax."""
    async with httpx.AsyncClient(base_url=ground.url, timeout=60) as client:
        while True:
            sent = [ground.any(chance) for _ in range(chance.randint(1, 2))]
            data = [text_of(body) for _, body in sent]
            tensor = {"name": "IMAGE", "datatype": "BYTES", "shape": [len(sent)], "data": data}
            asked = {"inputs": [tensor], "outputs": [{"name": "logits"}]}
            reply = await client.post(f"/v2/models/{NAME}/infer", json=asked)
            ground.tally.note("v2", reply.status_code, reply.headers.get("x-error-code", ""))
            if reply.status_code == 200:
                check(ground, reply, [name for name, _ in sent])
            await asyncio.sleep(REST if reply.status_code == 200 else 0.5)


def check(ground: Ground, reply: httpx.Response, names: list[str]) -> None:
    """Compare the logits in *reply* with what the bundle that it names says to the pictures *names*."""
    answer = reply.json()
    digest = reply.headers["x-model-digest"]
    if answer["model_version"] != digest:
        ground.tally.fail(f"v2: the body says {answer['model_version']}, the header {digest}")
    (output,) = answer["outputs"]
    logits = np.array(output["data"], dtype=np.float64).reshape(output["shape"])
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    for name, row in zip(names, powers / powers.sum(axis=1, keepdims=True), strict=True):
        expected = ground.expected.get(digest, {}).get(name, {})
        found = [
            ClassProbability(label=label, probability=float(value))
            for label, value in zip(ground.labels, row, strict=True)
            if label in expected
        ]
        ground.compare("v2", digest, name, found)


async def swapping(ground: Ground, chance: random.Random) -> None:
    """Load another bundle every few seconds; none is the one before, so each is opened and verified anew."""
    async with httpx.AsyncClient(base_url=ground.url, timeout=120) as client:
        while True:
            await asyncio.sleep(1 + 2 * chance.random())
            place = (ground.tally.outcomes["swap", "200"] + 1) % len(ground.folders)
            reply = await swap(client, ground.folders[place])
            ground.tally.note("swap", reply.status_code, reply.headers.get("x-error-code", ""))
            ready = await client.get(f"/v2/models/{NAME}/ready")
            ground.tally.note("swap ready", ready.status_code)


async def swap(client: httpx.AsyncClient, folder: str) -> httpx.Response:
    """Let the bundle in *folder* answer."""
    load: dict[str, Any] = {"parameters": {"folder": folder}}
    return await client.post(f"/v2/repository/models/{NAME}/load", json=load)


async def crowd(url: str, body: bytes, folder: str) -> None:
    """Ask so much at once that every thread of the server has been started, that of a second engine too."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        asked = [client.post("/v1/classify", json={"image": text_of(body)}) for _ in range(CROWD)]
        await asyncio.gather(*asked, *(client.get("/v1/card") for _ in range(CROWD)))
        await swap(client, folder)


def text_of(body: bytes) -> str:
    """Return *body* as base64."""
    return base64.b64encode(body).decode("ascii")
