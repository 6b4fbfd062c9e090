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
def test_a_fast_body_may_pause_for_what_it_is_ahead(num_bytes, seconds):
    async def pause() -> float:
        uploads = Uploads(1 << 30)
        settings = Settings()
        context = SimpleNamespace(headers={}, bytes=0)

        with uploads.open("client") as body:
            messages = [{"type": "http.request", "body": b"x" * num_bytes, "more_body": True}]
            loop = asyncio.get_running_loop()
            allowed = 0.0

            async def receive() -> dict[str, object]:
                nonlocal allowed
                allowed = (body.timer.when() or 0.0) - loop.time()  # type: ignore[union-attr]
                more = {"type": "http.request", "body": b"", "more_body": False}
                return messages.pop() if messages else more

            admitted = SimpleNamespace(
                service=SimpleNamespace(uploads=uploads, settings=settings),
                context=context,
                body=body,
                request=SimpleNamespace(receive=receive),
                end_upload=lambda: None,
            )
            await read_body(admitted, 1 << 30)  # type: ignore[arg-type]
            return allowed

    assert asyncio.run(pause()) == pytest.approx(seconds, abs=0.5)


def test_an_upload_that_was_fast_is_answered_after_a_pause(serve_with, onnx_runtime, jpeg):
    client = serve_with(onnx_runtime, min_body_rate=10, body_grace_seconds=0.05)
    request = post_of(jpeg)

    with connect(client) as wire:
        wire.sendall(request[:-100])
        time.sleep(1)  # twenty times the grace, of the 30 s that the first bytes are ahead
        wire.sendall(request[-100:])
        assert read(wire, to_the_end=False).status == 200
