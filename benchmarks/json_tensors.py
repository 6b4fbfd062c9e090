"""Time to parse a tensor in JSON, and how long parsing blocks the event loop.

The server's parser (`ours`) and orjson via lists (`other`) alternately read the same pixels as binary data,
as a flat list and as a nested list. Then both parse the JSON in a thread while an event loop sleeps for one
millisecond repeatedly; the maximum oversleeping is the delay of all other requests.

    python benchmarks/json_tensors.py [--quick] [--json]
"""

import asyncio
import statistics
import time
from collections.abc import Callable

import numpy as np
import orjson
from measure import Result, compare, parse, report
from numpy.typing import NDArray

from sopdeploy_service.api.v2.request import Signature, Tensor, parse_body

SIGNATURE = Signature(Tensor("images", "UINT8", (-1, 224, 224, 3)), (Tensor("logits", "FP32", (-1, 7)),), 32)
LIMIT = 32_000_000
TICK_SECONDS = 0.001


def body(pixels: NDArray[np.uint8], kind: str) -> tuple[bytes, str | None]:
    """Build the body of a request for *pixels* and its length header."""
    tensor = {"name": "images", "datatype": "UINT8", "shape": list(pixels.shape)}
    if kind == "binary":
        text = orjson.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": pixels.nbytes}}]})
        return text + pixels.tobytes(), str(len(text))
    data = pixels.tolist() if kind == "nested" else pixels.ravel().tolist()
    return orjson.dumps({"inputs": [{**tensor, "data": data}]}), None


def plainly(raw: bytes) -> NDArray[np.uint8]:
    """Parse the pixels in the JSON *raw* via lists, without checks."""
    (tensor,) = orjson.loads(raw)["inputs"]
    return np.array(tensor["data"], np.uint8).reshape(tensor["shape"])


async def wake_up_delay(work: Callable[[], object]) -> float:
    """Return by how many ms the event loop wakes up late, at most, while *work* runs in a thread."""
    task = asyncio.create_task(asyncio.to_thread(work))
    worst = 0.0
    while not task.done():
        began = time.perf_counter()
        await asyncio.sleep(TICK_SECONDS)
        worst = max(worst, time.perf_counter() - began - TICK_SECONDS)
    return worst * 1e3


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__)
    runs = 3 if arguments.quick else 9
    results = []
    for images in (1, 8) if arguments.quick else (1, 8, 25):
        pixels = np.random.default_rng(0).integers(0, 256, (images, 224, 224, 3), dtype=np.uint8)
        binary, header = body(pixels, "binary")
        for kind in ("flat", "nested"):
            raw, _ = body(pixels, kind)
            case = f"{images} images, {kind}, {len(raw) / 1e6:.1f} MB"
            ours = lambda raw=raw: parse_body(raw, None, SIGNATURE, LIMIT)  # noqa: E731
            other = lambda raw=raw: plainly(raw)  # noqa: E731
            results.append(compare(case, "orjson, lists, numpy", ours, other, runs=runs))
            late = [[asyncio.run(wake_up_delay(work)) for work in (ours, other)] for _ in range(runs)]
            medians = [statistics.median(side) for side in zip(*late, strict=True)]
            results.append(
                Result(
                    case=f"{case}: loop late",
                    against="orjson, lists, numpy",
                    ours=medians[0],
                    other=medians[1],
                    unit="ms",
                    runs=runs,
                )
            )
        as_binary = lambda raw=binary, head=header: parse_body(raw, head, SIGNATURE, LIMIT)  # noqa: E731
        results.append(compare(f"{images} images, binary", "nested JSON", as_binary, ours, runs=runs))
    report(results, as_json=arguments.json)


if __name__ == "__main__":
    main()
