"""A server with more models than memory: 100 names of one bundle, memory for 10 of them, popularity by Zipf.

    python benchmarks/memory_budget.py --bundle bundles/resnet18-0123456789ab --json

Every name has its own runtime, so each of them occupies memory like a bundle of its own. Clients send one
image after the other. The hit rate is the fraction of requests without a load of their own; that of an ideal
cache (LRU, 10 places) is computed from the names in the order in which they were sent. The peak of the memory
is that of the process without what it needs besides models (its memory at the end without the loaded models),
sampled 50 times per second. Requests that wait for the same load count as one miss, as in the ideal cache.
"""

import asyncio
import io
import os
import statistics
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
from measure import Result, existing, make_parser, report
from PIL import Image

from sopdeploy_service.inference.memory_budget import load_bytes, load_measured
from sopdeploy_service.server.background import BackgroundServer
from sopdeploy_service.settings import Settings

NAMES, PLACES = 100, 10
SAMPLE_SECONDS = 0.02


def ideal_hits(names: Sequence[str]) -> int:
    """Count the hits of an LRU cache with `PLACES` places."""
    cache, hits = OrderedDict[str, None](), 0
    for name in names:
        hits += name in cache
        cache[name] = None
        cache.move_to_end(name)
        if len(cache) > PLACES:
            cache.popitem(last=False)
    return hits


def resident(process: int) -> int:
    """Return the memory of *process* in bytes."""
    pages = Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def sampled_memory(process: int) -> Iterator[list[int]]:
    """Sample the memory of *process* during the block; yield the list of samples."""
    samples, ended = [resident(process)], threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            samples.append(resident(process))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


async def put_load(
    url: str, names: Sequence[str], image: bytes, clients: int
) -> tuple[Counter[int], dict[bool, list[float]]]:
    """Send *image* to each of the models *names* from *clients* clients.

    Returns the number of responses by status, and milliseconds: of those that waited until a model was loaded
    (True), and of the others (False).
    """
    statuses, milliseconds = Counter[int](), {True: list[float](), False: list[float]()}
    remaining = iter(names)

    async def client(session: httpx.AsyncClient) -> None:
        for name in remaining:
            response = await session.post(f"{url}/v1/classify?model={name}", content=image)
            statuses[response.status_code] += 1
            waited = "load;" in response.headers.get("server-timing", "")
            milliseconds[waited].append(response.elapsed.total_seconds() * 1000)

    async with httpx.AsyncClient(timeout=60) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    return statuses, milliseconds


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--bundle", type=existing, required=True, help="a small one: it is loaded often")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--exponent", type=float, default=1.0, help="of Zipf's law")
    arguments = parser.parse_args()
    settings = Settings(runtime="onnxruntime-cpu", threads=1, port=0)
    for _ in range(2):  # the first load also imports libraries
        loaded, size = load_measured(arguments.bundle, settings)
        loaded.runtime.close()
    # The last place is for the load, and half a place for the noise of the measured sizes.
    budget = round((PLACES - 0.5) * size + max(load_bytes(loaded.bundle), size))

    popularity = np.arange(1, NAMES + 1) ** -arguments.exponent
    drawn = np.random.default_rng(0).choice(NAMES, arguments.requests, p=popularity / popularity.sum())
    names = [f"model{number}" for number in drawn]
    file = io.BytesIO()
    Image.new("RGB", (224, 224), (200, 90, 30)).save(file, "JPEG")
    sources = [f"model{number}={arguments.bundle}" for number in range(NAMES)]
    limited = Settings.model_validate({**settings.model_dump(), "memory_budget": budget})
    with BackgroundServer(sources, limited) as server, sampled_memory(server._process.pid) as samples:
        statuses, milliseconds = asyncio.run(put_load(server.url, names, file.getvalue(), arguments.clients))
        samples.append(resident(server._process.pid))
        metrics = httpx.get(f"{server.url}/metrics").text.splitlines()
    loads, occupied = (
        sum(float(line.split()[-1]) for line in metrics if line.startswith(f"sopdeploy_{name}{{"))
        for name in ("model_loads_total", "model_memory_bytes")
    )
    besides = samples[-1] - occupied
    count = len(names)
    errors = sum(number for status, number in statuses.items() if status >= 500)
    ideal = f"LRU with {PLACES} places"
    report(
        [
            Result(
                case="hit rate", against=ideal, ours=100 * (1 - loads / count),
                other=100 * ideal_hits(names) / count, unit="%", runs=count,
            ),
            Result(
                case="peak memory of the models", against="budget", ours=(max(samples) - besides) / 1e6,
                other=budget / 1e6, unit="MB", runs=len(samples),
            ),
            Result(case="responses with status 5xx", ours=errors, unit="", runs=count),
            *(
                Result(
                    case=f"median response, {case}", ours=statistics.median(milliseconds[waited]), unit="ms",
                    runs=len(milliseconds[waited]),
                )
                for case, waited in (("loaded", False), ("after a load", True))
            ),
        ],
        as_json=arguments.json,
        bundle=loaded.bundle.name,
        clients=arguments.clients,
    )  # fmt: skip


if __name__ == "__main__":
    main()
