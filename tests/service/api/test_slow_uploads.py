"""A body may pause, and what it loses by that is made up by faster pieces."""

import asyncio
from types import SimpleNamespace

import pytest

from sopdeploy_service.api import admission
from sopdeploy_service.inference.uploads import Uploads
from sopdeploy_service.settings import Settings

# seconds until a piece and its bytes -> seconds that the server waits for each, and for the end
PIECES = {
    "a pause before the first byte": ([(6, 0)], [10, 4]),
    "ten seconds ahead": ([(0, 100_000)], [10, 20]),
    "far ahead": ([(0, 2_000_000)], [10, 30]),
    "fast after a pause": ([(6, 0), (0, 50_000)], [10, 4, 9]),
    "at the lowest rate": ([(8, 80_000)] * 3, [10] * 4),
    "slower": ([(5, 20_000)] * 3, [10, 7, 4, 1]),
}


@pytest.mark.parametrize(("pieces", "expected"), PIECES.values(), ids=PIECES)
def test_a_body_may_fall_behind_the_lowest_rate_for_a_while(monkeypatch, pieces, expected):
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(admission, "time", clock)

    allowed: list[float] = []
    end = asyncio.timeout

    def timeout(grace: float) -> asyncio.Timeout:
        allowed.append(grace)
        return end(grace)

    monkeypatch.setattr(asyncio, "timeout", timeout)
    left = [*pieces, (0, 0)]

    async def receive() -> dict[str, object]:
        seconds, num_bytes = left.pop(0)
        clock.now += seconds
        return {"type": "http.request", "body": b"x" * num_bytes, "more_body": bool(left)}

    async def upload() -> None:
        uploads = Uploads(1 << 30)
        with uploads.open() as body:
            admitted = SimpleNamespace(
                service=SimpleNamespace(uploads=uploads, settings=Settings()),
                context=SimpleNamespace(headers={}, bytes=0),
                body=body,
                request=SimpleNamespace(receive=receive),
                end_upload=lambda: None,
            )
            await admission.read_body(admitted, 1 << 30)  # type: ignore[arg-type]

    asyncio.run(upload())
    assert allowed == pytest.approx(expected)
