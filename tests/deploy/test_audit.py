"""`make audit` with the real pip-audit and a fake or unreachable advisory service."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import audit
import pytest

LOCK = """\
broken==1.0 \\
    --hash=sha256:{0}
numpy==2.4.6 ; python_full_version < '3.12' \\
    --hash=sha256:{0}
numpy==2.5.5 ; python_full_version >= '3.12' \\
    --hash=sha256:{0}
""".format("0" * 64)
UNREACHABLE = "http://127.0.0.1:1"


class Advisories(BaseHTTPRequestHandler):
    """A fake OSV service: one advisory for `broken`, none for other packages."""

    asked: list[tuple[str, str]] = []  # noqa: RUF012
    vulnerable = "broken"

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = query["package"]["name"]
        self.asked.append((name, query["version"]))
        advisory: dict[str, Any] = {"id": "PYSEC-1", "affected": [{"package": query["package"]}]}
        body = json.dumps({"vulns": [advisory]} if name == self.vulnerable else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Block all services but the fake one and use a small lock file."""
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock" / "cpu.txt").write_text(LOCK)
    monkeypatch.setattr(audit, "FOLDER", tmp_path / "lock")
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, UNREACHABLE)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("PIP_AUDIT_OSV_URL", UNREACHABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Advisories]]:
    handler = type("Handler", (Advisories,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("PIP_AUDIT_OSV_URL", f"http://127.0.0.1:{server.server_port}")
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def run(capsys: pytest.CaptureFixture[str]) -> tuple[object, list[str]]:
    with pytest.raises(SystemExit) as ended:
        audit.main()
    return ended.value.code, capsys.readouterr().out.splitlines()


def test_a_known_vulnerability_fails_the_audit(
    service: type[Advisories], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["broken==1.0 is vulnerable: PYSEC-1", "audited 3 locked packages, 1 vulnerable"]
    assert run(capsys) == (1, lines)


def test_versions_for_all_platforms_are_audited(
    service: type[Advisories], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "vulnerable", "")
    assert run(capsys) == (0, ["audited 3 locked packages, none vulnerable"])
    assert sorted(service.asked) == [("broken", "1.0"), ("numpy", "2.4.6"), ("numpy", "2.5.5")]


def test_an_unreachable_service_is_reported_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, (line,) = run(capsys)
    assert code == 0
    assert line.startswith("NOT audited: 3 of 3 locked packages (broken==1.0, numpy==2.4.6, numpy==2.5.5): ")
    assert "127.0.0.1 is unreachable" in line
    assert "pypi.org is unreachable" in line


REPORTS = {  # what pip-audit does: exit code and first line of the audit
    "unknown packages": (
        f"print({json.dumps({'dependencies': [{'name': 'broken', 'skip_reason': 'not found'}]})!r})",
        (0, "NOT audited: 3 of 3 locked packages"),
    ),
    "some unknown packages": (
        f"print({json.dumps({'dependencies': [{'name': 'broken', 'version': '1.0', 'vulns': []}]})!r})",
        (0, "NOT audited: 2 of 3 locked packages (numpy==2.4.6, numpy==2.5.5): osv does not know them"),
    ),
    "a crash": ("import sys; sys.exit('no such option')", ("pip-audit failed (1): no such option", "")),
}


@pytest.mark.parametrize("case", REPORTS)
def test_the_report_decides_and_not_the_exit_code(
    case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program, (code, line) = REPORTS[case]
    (tmp_path / "pip_audit.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found, lines = run(capsys)
    assert found == code
    assert lines[0].startswith(line) if line else lines == []
