"""Two versions serve one folder of bundles; here both are the version of this checkout."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import rolling_upgrade

OK, BUSY = httpx.Response(200), httpx.Response(503, text='{"code": "queue_full"}')
DRAINING = httpx.Response(503, text='{"code": "draining"}')


@pytest.mark.parametrize(
    ("first", "result"),
    [
        (OK, "answered"),
        (DRAINING, "answered"),
        (httpx.ConnectError("refused"), "answered"),  # by the other server
        (BUSY, "failed: " + BUSY.text),
        (httpx.ReadError("reset"), "failed: ReadError"),
        (httpx.RemoteProtocolError("no response"), "failed: RemoteProtocolError"),
        (httpx.ReadTimeout("no answer"), "failed: ReadTimeout"),
    ],
)
def test_a_request_that_a_server_has_lost_is_not_answered_by_another_one(
    first: Any, result: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"one": first, "two": OK}

    def classify(self: object, server: Any) -> httpx.Response:
        if isinstance(answers[server.url], Exception):
            raise answers[server.url]
        return answers[server.url]

    monkeypatch.setattr(rolling_upgrade.Balancer, "classify", classify)
    servers: Any = [SimpleNamespace(url=name) for name in answers]
    balancer = rolling_upgrade.Balancer(servers, b"")
    balancer.send(0)
    assert balancer.results == {result: 1}


@pytest.mark.slow
def test_either_version_moves_the_live_link_and_no_request_fails() -> None:
    program = Path(sys.executable).with_name("sopdeploy")
    command = [sys.executable, rolling_upgrade.__file__, program, program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed: none" in done.stdout
