"""The processes of several devices keep photographs in one folder, which the supervisor writes."""

import asyncio
import socket
import struct
from pathlib import Path

import httpx
import pytest

from sopdeploy.decision import Decision, Rejection
from sopdeploy.kept import KeptRecord, read_kept
from sopdeploy_service.devices import control
from tests.service.children import TWO_DEVICES, WAYS, serving
from tests.service.test_keep import photos, results
from tests.sopdeploy.test_kept import record_of


def test_two_processes_keep_in_one_folder(tmp_path: Path, make_bundle, until) -> None:
    decision = Decision(rejection=Rejection(score="energy", threshold=1e9))
    bundle = make_bundle(tmp_path / "bundle", decision=decision)
    kept = tmp_path / "kept"
    bodies = photos(12)
    options = ["--setting", f"keep={kept}", "--setting", "keep_bytes=65536", "--setting", "keep_sample=1"]
    with serving(str(bundle), *options, *WAYS[TWO_DEVICES]) as client:
        for body in bodies:
            with httpx.Client(base_url=client.base_url) as other:  # a connection to either process
                assert other.post("/v1/classify", content=body).status_code == 200
        until(lambda: sum(results(client).values()) == 12)
        assert results(client) == {"kept": 12}
        assert len({record.image for _, record in read_kept(kept)}) == 8
        assert sum(4096 for file in kept.iterdir() if file.name != ".lock") == 65_536


def sent(data: bytes) -> tuple[bytes, KeptRecord]:
    """What the supervisor receives of *data* from a process."""

    async def receive() -> tuple[bytes, KeptRecord]:
        ours, theirs = socket.socketpair()
        with ours:
            theirs.sendall(data)
            theirs.close()
            ours.setblocking(False)
            return await control.receive_kept(ours)

    return asyncio.run(receive())


def test_the_supervisor_receives_what_a_process_sends() -> None:
    text = record_of().model_dump_json().encode()
    assert sent(control.RECORD_HEAD.pack(len(text)) + text + b"image") == (b"image", record_of())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        control.RECORD_HEAD.pack(2) + b"{}",
        control.RECORD_HEAD.pack(2**32 - 1) + b"{}",
        record_of().model_dump_json().replace(".jpg", "/../../x.jpg").encode(),
    ],
)
def test_no_other_file_is_written(data: bytes) -> None:
    if data.startswith(b'{"image'):
        data = control.RECORD_HEAD.pack(len(data)) + data
    with pytest.raises((ValueError, struct.error)):
        sent(data)


def test_a_photograph_that_is_too_large_is_not_received(monkeypatch) -> None:
    monkeypatch.setattr(control, "MAX_KEPT_BYTES", 1000)
    with pytest.raises(ValueError, match="too large"):
        sent(b"x" * 1001)
