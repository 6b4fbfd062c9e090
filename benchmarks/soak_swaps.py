"""Clients of the soak test that send JSON, use the Open Inference Protocol, and swap models.

Every response contains the digest of its bundle and is compared with the expected result of that bundle.
"""

import asyncio
import base64
import random

import httpx
import numpy as np
from soak_clients import PAUSE, Scenario

from sopdeploy.client import ClassProbability
from sopdeploy.files import move_link

NAME = "soak"
REQUESTS = 48


async def json_bodies(scenario: Scenario, rng: random.Random) -> None:
    """Send one to three images as base64 and compare each result."""
    async with httpx.AsyncClient(base_url=scenario.url, timeout=60) as client:
        while True:
            sent = [scenario.choose_body(rng) for _ in range(rng.randint(1, 3))]
            body = {"images": [to_base64(body) for _, body in sent], "top_k": scenario.classes}
            reply = await client.post("/v1/classify", json=body)
            document = reply.json()
            scenario.tally.note("json", reply.status_code, document.get("code", ""))
            for (name, _), result in zip(sent, document.get("results", ()), strict=False):
                classes = [ClassProbability(**item) for item in result["classes"]]
                scenario.compare("json", reply.headers["x-model-digest"], name, classes)
            await asyncio.sleep(PAUSE if reply.status_code == 200 else 0.5)


async def inference_protocol(scenario: Scenario, rng: random.Random) -> None:
    """Request the logits of one or two images with the protocol and compare their softmax."""
    async with httpx.AsyncClient(base_url=scenario.url, timeout=60) as client:
        while True:
            sent = [scenario.choose_body(rng) for _ in range(rng.randint(1, 2))]
            data = [to_base64(body) for _, body in sent]
            tensor = {"name": "IMAGE", "datatype": "BYTES", "shape": [len(sent)], "data": data}
            request = {"inputs": [tensor], "outputs": [{"name": "logits"}]}
            reply = await client.post(f"/v2/models/{NAME}/infer", json=request)
            scenario.tally.note("v2", reply.status_code, reply.headers.get("x-error-code", ""))
            if reply.status_code == 200:
                compare_logits(scenario, reply, [name for name, _ in sent])
            await asyncio.sleep(PAUSE if reply.status_code == 200 else 0.5)


def compare_logits(scenario: Scenario, reply: httpx.Response, names: list[str]) -> None:
    """Compare the softmax of the logits in *reply* with the expected results of the images *names*."""
    document = reply.json()
    digest = reply.headers["x-model-digest"]
    if document["model_version"] != digest:
        scenario.tally.fail(
            f"v2: version {document['model_version']} in the body, digest {digest} in the header"
        )
    (output,) = document["outputs"]
    logits = np.array(output["data"], dtype=np.float64).reshape(output["shape"])
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    for name, row in zip(names, powers / powers.sum(axis=1, keepdims=True), strict=True):
        expected = scenario.expected.get(digest, {}).get(name, {})
        classes = [
            ClassProbability(label=label, probability=float(value))
            for label, value in zip(scenario.labels, row, strict=True)
            if label in expected
        ]
        scenario.compare("v2", digest, name, classes)


async def model_swaps(scenario: Scenario, rng: random.Random) -> None:
    """Move the link that the server follows to another bundle every few seconds."""
    async with httpx.AsyncClient(base_url=scenario.url, timeout=120) as client:
        while True:
            await asyncio.sleep(1 + 2 * rng.random())
            index = (scenario.tally.outcomes["swap", "200"] + 1) % len(scenario.bundles)
            move_link(scenario.link, str(scenario.bundles[index]))
            ready = await client.get(f"/v2/models/{NAME}/ready")
            scenario.tally.note("swap", ready.status_code)


async def start_all_threads(url: str, body: bytes) -> None:
    """Send so many requests at once that the server starts all its threads."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        requests = [client.post("/v1/classify", json={"image": to_base64(body)}) for _ in range(REQUESTS)]
        await asyncio.gather(*requests, *(client.get("/v1/card") for _ in range(REQUESTS)))


def to_base64(body: bytes) -> str:
    """Encode *body* as base64."""
    return base64.b64encode(body).decode("ascii")
