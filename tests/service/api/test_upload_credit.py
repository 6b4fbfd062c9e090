"""A body that was faster than the minimum rate may pause for longer, within a limit."""

import asyncio
import time
from types import SimpleNamespace

import pytest

from sopdeploy_service.api.admission import MAX_CREDIT_SECONDS, read_body
from sopdeploy_service.inference.uploads import Uploads
from sopdeploy_service.settings import Settings
from tests.support.raw import connect, post_of, read

# bytes that have arrived at once; the seconds that the body may then pause
PAUSES = {
    "nothing": (0, 5.0),
    "ten seconds ahead": (100_000, 15.0),
    "far ahead": (2_000_000, MAX_CREDIT_SECONDS),
}


@pytest.mark.parametrize(("num_bytes", "seconds"), PAUSES.values(), ids=PAUSES)
def test_a_fast_body_may_pause_for_what_it_is_ahead(monkeypatch, num_bytes, seconds):
    allowed: list[float] = []
    end = asyncio.timeout

    def timeout(grace: float) -> asyncio.Timeout:
        allowed.append(grace)
        return end(grace)

    async def pause() -> None:
        uploads = Uploads(1 << 30)
        messages = [
            {"type": "http.request", "body": b"", "more_body": False},
            {"type": "http.request", "body": b"x" * num_bytes, "more_body": True},
        ]

        async def receive() -> dict[str, object]:
            return messages.pop()

        with uploads.open() as body:
            admitted = SimpleNamespace(
                service=SimpleNamespace(uploads=uploads, settings=Settings()),
                context=SimpleNamespace(headers={}, bytes=0),
                body=body,
                request=SimpleNamespace(receive=receive),
                end_upload=lambda: None,
            )
            monkeypatch.setattr(asyncio, "timeout", timeout)
            await read_body(admitted, 1 << 30)  # type: ignore[arg-type]

    asyncio.run(pause())

    assert allowed == [5.0, pytest.approx(seconds, abs=0.5)]


def test_an_upload_that_was_fast_is_answered_after_a_pause(serve_with, onnx_runtime, jpeg):
    client = serve_with(onnx_runtime, min_body_rate=10, body_grace_seconds=0.05)
    request = post_of(jpeg)

    with connect(client) as wire:
        wire.sendall(request[:-100])
        time.sleep(1)  # twenty times the grace, of the 30 s that the first bytes are ahead
        wire.sendall(request[-100:])
        assert read(wire, to_the_end=False).status == 200
