"""Requests that the server of the label page answers, and those that it refuses."""

import itertools
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
from typer.testing import CliRunner

from sopdeploy.photos.files import name_id
from sopdeploy.project import Origin, utc_now
from sopdeploy_commands.app import app as program
from sopdeploy_service.labelling.label import app
from sopdeploy_service.labelling.label.app import run_label_server
from sopdeploy_service.labelling.label.folders import LabelFolders
from sopdeploy_service.settings import Settings
from tests.service.labelling.label.conftest import KEY, files_below, identity, label_server
from tests.support.forged import write_hollow
from tests.support.golden import check_golden
from tests.support.raw import connect
from tests.support.service import picture_bytes

ONE = identity(1)


@pytest.fixture
def client(keep, open_folders):
    keep(1, [0.0, 2.0, 1.0])
    with label_server(open_folders()) as client:
        yield client


def answer(kind: str = "class", name: str = "hat", one: str = ONE) -> dict[str, str]:
    return {"id": one, "kind": kind, "name": name}


def test_the_state_has_the_photograph_and_the_classes_by_probability(client, tmp_path):
    (tmp_path / "photos" / "a scarf").mkdir(parents=True)
    state = client.get("/state").json()
    shown = {"id": ONE, "decides": False, "known": None, "reported": False, "suggested": None}
    assert state["photograph"] == shown
    assert [one["name"] for one in state["classes"]] == ["shoes", "t-shirt", "hat", "a scarf"]
    assert [one["probability"] for one in state["classes"]] == [
        *(pytest.approx(value, abs=1e-3) for value in (0.665, 0.245, 0.090)),
        None,
    ]
    assert (state["done"], state["left"], state["next"]) == (0, 1, [ONE])
    image = client.get(f"/images/{ONE}")
    assert image.content == (tmp_path / "kept" / f"{ONE}.jpg").read_bytes()
    assert image.headers["content-type"] == "image/jpeg"


REFUSED = {
    "a name that resolves to this address": {"host": "attacker.example"},
    "such a name with the port": {"host": "attacker.example:8001"},
    "a name that begins with localhost": {"host": "localhost.attacker.example"},
    "no name": {"host": ""},
    "no valid name": {"host": "[::1"},
    "user information": {"host": "localhost@attacker.example"},
    "a page of another host": {"origin": "https://attacker.example"},
    "a page of another port": {"origin": "http://127.0.0.1:1"},
    "a page without an origin": {"origin": "null"},
    "an image in a page of another host": {"sec-fetch-site": "cross-site"},
    "an image in a page of another port": {"sec-fetch-site": "same-site"},
}


PATHS = {
    **dict.fromkeys(("/", "/state", "/labelled", f"/images/{ONE}", "/none"), "GET"),
    **dict.fromkeys(("/label", "/correct", "/undo"), "POST"),
}


def test_requests_of_other_origins_are_refused_and_change_nothing(client, tmp_path):
    before = files_below(tmp_path)
    for (case, headers), (path, method) in itertools.product(REFUSED.items(), PATHS.items()):
        if path == "/" and "sec-fetch-site" in headers:
            continue  # a link to the page
        reply = client.request(
            method, path, headers=headers, json=answer() if method == "POST" else None
        )
        assert reply.status_code == 403, (case, path)
        assert reply.text == "requests of other pages and for other hosts are refused"
        assert files_below(tmp_path) == before


def test_the_page_answers_to_each_name_of_this_machine_and_to_its_own_origin(client):
    for name in ("localhost:1", "127.0.0.1:1", "[::1]:1", "LOCALHOST:1"):
        reply = client.get("/state", headers={"host": name, "origin": f"http://{name}"})
        assert reply.status_code == 200, name


def test_each_name_that_a_trusted_proxy_forwards_is_checked(keep, open_folders):
    keep(1)
    own, other = (("x-forwarded-host", name) for name in ("localhost", "evil.example"))
    with label_server(open_folders(), trusted_proxies="127.0.0.1") as client:
        assert [
            client.get("/state", headers=sent).status_code for sent in ([own], [own, other])
        ] == [
            200,
            403,
        ]


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems have no such names")
def test_a_page_of_folders_whose_names_are_not_utf8_works(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / "a.jpg").write_bytes(picture_bytes())
    folders = LabelFolders(folder, folder / "photos")
    with label_server(folders) as client:
        state = client.get("/state").json()
        assert state["command"] == f"sopdeploy train --data '{tmp_path}/caf?/photos'"
        (folder / "photos").write_bytes(b"no folder")
        reply = client.post("/label", json={**answer(), "id": state["photograph"]["id"]})
        assert (reply.status_code, "caf?/photos" in reply.json()["detail"]) == (507, True)


def test_a_form_or_a_large_body_cannot_send_a_label(client, tmp_path):
    body = b'{"id": "%s", "kind": "skip"}' % ONE.encode()
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=b",
    ):
        assert (
            client.post("/label", content=body, headers={"content-type": kind}).status_code
            == 415
        )
    for large in (b" " * 10_001, iter((b"{", b"}"))):  # which is not read
        reply = client.post(
            "/label", content=large, headers={"content-type": "application/json"}
        )
        assert reply.status_code == 413
    assert files_below(tmp_path) == {f"kept/{ONE}.jpg", f"kept/{ONE}.json"}


OTHER_FILES = (
    *(
        f"/images/{name}"
        for name in (identity(2), f"{ONE}.jpg", f"{ONE}.json", f"{ONE}%00", "%2e%2e", ".")
    ),
    *(
        "/images/..%2fsecret.txt",
        "/images/../secret.txt",
        "/images/%2fetc%2fpasswd",
        "//etc/passwd",
    ),
    *("/kept", "/photos", "/docs", "/openapi.json", "/label.js"),
)


def test_no_other_file_can_be_read(client, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "kept" / "secret.txt").write_text("secret")
    for path in OTHER_FILES:
        reply = client.get(path)
        assert reply.status_code == 404, path
        assert "secret" not in reply.text


UNUSABLE = [
    *(answer(name=name) for name in ("../hat", "<script>", "")),
    *(answer(one=one) for one in ("../../etc/passwd", ONE.upper() + "x")),
    *(answer(kind="delete"), {**answer(), "path": "/etc"}, {}, []),
]


NO_JSON = [
    *(
        b'{"id": %b}' % value
        for value in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b'"\\ud800"', b"[" * 500)
    ),
    b'{"id": ' + b"[" * 300 + b"]" * 300 + b"}",
    b'{"id": "%b", "id": "x", "kind": "skip"}' % ONE.encode(),
    *(
        b"",
        b"{",
        b"\xff",
        b'{"id": "%b", "kind": "class", "name": "%b"}' % (ONE.encode(), b"a" * 9000),
    ),
]


def test_a_label_that_cannot_be_used_is_refused_and_changes_nothing(client, tmp_path):
    before = files_below(tmp_path)
    assert client.post("/label", json=answer(one=identity(2))).status_code == 409
    assert {client.post("/label", json=body).status_code for body in UNUSABLE} == {422}
    for body in NO_JSON:
        reply = client.post(
            "/label", content=body, headers={"content-type": "application/json"}
        )
        assert (reply.status_code, list(reply.json())) == (422, ["detail"]), body
    assert client.get("/state").json()["left"] == 1
    assert files_below(tmp_path) == before


def test_a_full_disk_is_described_and_the_photograph_waits(client, tmp_path, monkeypatch):
    def refuse(_path: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device", "photos")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        reply = client.post("/label", json=answer())
    assert reply.status_code == 507
    assert reply.json()["detail"].startswith(
        "photos: cannot be read or written (No space left on device)"
    )
    assert files_below(tmp_path) == {f"kept/{ONE}.jpg", f"kept/{ONE}.json"}
    assert client.post("/label", json=answer()).status_code == 200


def test_every_request_needs_the_key_which_becomes_a_cookie_that_scripts_cannot_read(
    keep, open_folders, tmp_path
):
    keep(1)
    with label_server(open_folders(), cookies={}) as client:
        for (path, method), query, cookie in itertools.product(
            PATHS.items(),
            ("", "?key=", "?key=wrong"),
            ("", "sopdeploy-label-8000=wrong", "sopdeploy-label-8000=", ";=\u00e9;"),
        ):
            headers = {"cookie": cookie.encode()} if cookie else {}
            body = answer() if method == "POST" else None
            assert (
                client.request(method, path + query, headers=headers, json=body).status_code
                == 401
            )
        assert files_below(tmp_path) == {f"kept/{ONE}.jpg", f"kept/{ONE}.json"}
        reply = client.get(f"/?key={KEY}")
        assert (reply.status_code, reply.headers["location"]) == (303, "./")
        cookie = reply.headers["set-cookie"]
        assert {"HttpOnly", "SameSite=lax"} <= set(cookie.split("; "))
        assert client.get("/state").json()["left"] == 1  # with the cookie
        names = {"192.168.1.5:8001": 200, "desk:8001": 200, "attacker.example": 403}
        headers = {"cookie": f"sopdeploy-label-8000={KEY}"}
        assert {
            name: client.get("/state", headers={**headers, "host": name}).status_code
            for name in names
        } == names


def test_the_pages_of_two_servers_stay_open_in_one_browser(keep, open_folders):
    """A browser sends the cookies of a host to all its ports, so those of two pages need two names."""
    names = []
    for port in (8001, 8002):
        with label_server(open_folders(), cookies={}, port=port) as client:
            names += client.get(f"/?key={KEY}").cookies
            assert client.get("/state").status_code == 200
    assert names == ["sopdeploy-label-8001", "sopdeploy-label-8002"]


BEHIND = {
    "allowed_hosts": ("*.example.com",),
    "trusted_proxies": ("127.0.0.1",),
    "root_path": "/ml",
}
PROXIED = {
    "host": "upstream",
    "x-forwarded-host": "shop.example.com",
    "x-forwarded-proto": "https",
}


@pytest.mark.parametrize(
    "prefix", ["/ml", ""], ids=["a prefix that stays", "a prefix that is removed"]
)
def test_the_page_is_served_behind_a_proxy_as_the_service_is(
    keep, open_folders, prefix
) -> None:
    keep(1)
    allowed = {**BEHIND, "allowed_hosts": ("upstream", "*.example.com")}
    with label_server(open_folders(), cookies={}, **allowed) as client:
        reply = client.get(f"{prefix}/?key={KEY}", headers=PROXIED)
        assert (reply.status_code, reply.headers["location"]) == (303, "/ml/")
        client.cookies.set("sopdeploy-label-8000", KEY)
        posted = {**PROXIED, "origin": "https://shop.example.com"}
        assert client.get(f"{prefix}/", headers=PROXIED).status_code == 200
        assert client.get(f"{prefix}/images/{ONE}", headers=PROXIED).status_code == 200
        assert client.post(f"{prefix}/label", json=answer(), headers=posted).status_code == 200
        assert client.get("/ml", headers=PROXIED).headers["location"] == "/ml/"
        assert (
            client.get(
                f"{prefix}/state", headers={**PROXIED, "x-forwarded-host": "x.org"}
            ).status_code
            == 403
        )
    with label_server(open_folders(), **BEHIND) as client:
        assert (
            client.get(f"{prefix}/state", headers=PROXIED).status_code == 403
        )  # `upstream` is not listed


def test_the_command_reads_the_settings_of_the_environment(keep, tmp_path, monkeypatch) -> None:
    keep(1)
    given: list[Settings] = []
    monkeypatch.setenv("SOPDEPLOY_ALLOWED_HOSTS", "shop.example.com")
    monkeypatch.setenv("SOPDEPLOY_ROOT_PATH", "/ml")
    monkeypatch.setattr("uvicorn.Server.run", lambda *_args, **_options: None)
    label_config = app.label_config
    monkeypatch.setattr(
        app,
        "label_config",
        lambda page, settings: given.append(settings) or label_config(page, settings),
    )
    arguments = [
        "label",
        str(tmp_path / "kept"),
        "--photos",
        str(tmp_path / "photos"),
        "--port",
        "0",
    ]
    assert CliRunner().invoke(program, arguments).exit_code == 0
    assert (given[0].allowed_hosts, given[0].root_path, given[0].port) == (
        ("shop.example.com",),
        "/ml",
        0,
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])  # noqa: S104
def test_every_address_has_a_random_key(keep, tmp_path, host, monkeypatch):
    keep(1)
    ready: list[tuple[str, int]] = []
    monkeypatch.setattr("uvicorn.Server.run", lambda *_args, **_options: None)
    for _ in range(2):
        settings = Settings(host=host, port=0)
        run_label_server(
            tmp_path / "kept", tmp_path / "photos", settings, lambda *given: ready.append(given)
        )
    assert len({re.search(r"^http://.+:\d+/\?key=(.{22})$", url)[1] for url, _ in ready}) == 2
    assert [count for _, count in ready] == [1, 1]


HEAD = b"POST /label HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HEAD += b"Cookie: sopdeploy-label-8000=" + KEY.encode() + b"\r\n"
ENDLESS = {
    "a header": (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 1_000_000, 431),
    "headers": (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 10_000, 431),
    "a path": (b"GET /" + b"a" * 100_000, 414),
    "a negative length": (HEAD + b"Content-Length: -5\r\n\r\n", 400),
    "digits of another script": (HEAD + b"Content-Length: \xd9\xa5\r\n\r\n", 400),
    "a body that stops": (HEAD + b"Content-Length: 50\r\n\r\n{", 408),
    "headers that stop": (b"GET / HTTP/1.1\r\nHost: ", 408),
}


@pytest.mark.parametrize("case", ENDLESS)
def test_a_client_that_is_endless_or_slow_is_refused_as_by_the_service(
    case: str, keep, open_folders, monkeypatch
) -> None:
    request, status = ENDLESS[case]
    monkeypatch.setattr(app, "BODY_SECONDS", 0.1)
    seconds = 0.5 if status == 408 else 60
    keep(1)
    with (
        label_server(open_folders(), header_timeout=seconds) as client,
        connect(client) as wire,
    ):
        with suppress(OSError):  # the server may close the connection before the last byte
            wire.sendall(request)
        assert wire.recv(64).startswith(b"HTTP/1.1 %d " % status)
        assert client.get("/state").status_code == 200


def test_a_link_to_the_folder_of_the_classes_has_its_own_siblings(
    keep, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk" / "flowers").mkdir(parents=True)
    Path("photos").symlink_to("disk/flowers")
    keep(1)
    keep(2)

    def label(*_args: object, **_options: object) -> LabelFolders:
        folders = LabelFolders(Path("kept"), Path("photos"))
        folders.label(identity(1), "hat")
        folders.label(identity(2), None)
        return folders

    monkeypatch.setattr(app, "run_label_server", label)
    result = CliRunner().invoke(program, ["label", "kept", "--photos", "photos"])
    assert result.exit_code == 0, result.output
    assert "next: sopdeploy train --data photos --unknown photos-unknown" in " ".join(
        result.output.split()
    )
    assert files_below(tmp_path) >= {
        f"disk/flowers/hat/{identity(1)}.jpg",
        f"photos-unknown/{identity(2)}.jpg",
    }


def test_the_printed_command_continues_from_the_live_run_if_it_is_here(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("kept", "photos", "bundles"):
        Path(name).mkdir()
    fields = {"run_id": "0", "started": utc_now(), "data": "photos"}
    origin = Origin(run="photos-1", num_images=9, num_classes=3, **fields)
    bundle = write_hollow(Path("bundles"), origin=origin)
    folders, start = LabelFolders(Path("kept"), Path("photos")), "sopdeploy train --data photos"
    Path("bundles/live").symlink_to(bundle.name)
    assert app.training_command(folders, Path("photos")) == start  # its run is elsewhere
    Path("runs/photos-1").mkdir(parents=True)
    Path("runs/photos-1/best.pt").touch()
    assert app.training_command(folders, Path("photos")) == f"{start} --from bundles/live"
    Path("bundles/live").unlink()
    assert app.training_command(folders, Path("photos")) == start


def test_only_labelled_photographs_of_the_list_are_shown_and_corrected(client, tmp_path):
    (tmp_path / "photos" / "hat").mkdir(parents=True)
    (tmp_path / "photos" / "hat" / "link.jpg").symlink_to("/etc/passwd")
    (tmp_path / "photos" / "hat" / "notes.txt").write_text("no image")
    assert client.get("/labelled").json()["photographs"] == []
    client.post("/label", json=answer())
    assert client.post("/correct", json={"id": ONE, "name": "shoes"}).status_code == 409
    (labelled,) = client.get("/labelled").json()["photographs"]
    assert (labelled["name"], labelled["held_out"]) == ("hat", False)
    assert client.get(f"/images/{labelled['id']}").status_code == 200
    body = {"id": labelled["id"], "name": "a/b"}
    assert client.post("/correct", json=body).status_code == 422
    (corrected,) = client.post("/correct", json={**body, "name": None}).json()["photographs"]
    assert (corrected["name"], corrected["id"] != labelled["id"]) == (None, True)
    assert client.get(f"/images/{labelled['id']}").status_code == 404
    assert (tmp_path / "photos-unknown" / f"{ONE}.jpg").exists()


def test_a_suggestion_that_names_no_class_is_told_but_not_offered(keep, open_folders):
    keep(1, reasons=("reported",), suggested="../train")
    with label_server(open_folders()) as client:
        state = client.get("/state").json()
    assert state["photograph"]["suggested"] == "../train"
    assert "../train" not in [one["name"] for one in state["classes"]]


def test_a_grid_shows_some_photographs_and_counts_all(client, monkeypatch) -> None:
    ids = [f"{number:032x}" for number in range(app.MAX_CELLS + 2)]
    monkeypatch.setattr(LabelFolders, "suggested", lambda _folders: {"hat": ids})
    [grid] = client.get("/grids").json()["grids"]
    assert (grid["name"], grid["count"], grid["ids"]) == ("hat", len(ids), ids[:-2])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_drawn_labels_corrections_and_steps_back_leave_what_the_golden_has(
    keep, open_folders, tmp_path, monkeypatch, pytestconfig, seed
) -> None:
    """Two browsers label, skip, go back and correct; the server starts again in between."""
    monkeypatch.setattr("sopdeploy_service.labelling.label.folders.LEASE_SECONDS", 1e6)
    random = Random(seed)
    for number in range(1, 15):
        logits = [random.choice((0.0, 1.0, 2.5)) for _ in range(3)]
        changes: dict[str, object] = {"near_hash": "f" * 16} if number in (3, 4) else {}
        if random.random() < 0.3:
            changes |= {
                "reasons": ("reported",),
                "suggested": random.choice(("hat", "cap", None)),
            }
        keep(number, logits, decides=random.random() < 0.5, **changes)

    story = []
    for _ in range(2):
        with label_server(open_folders()) as client:
            for _ in range(25):
                session = {"x-session": random.choice("ab")}
                shown = client.get("/state", headers=session).json()["photograph"]
                step = random.choice(
                    ("class", "class", "class", "unknown", "skip", "undo", "correct")
                )
                name = random.choice(("hat", "shoes", "t-shirt", "cap", "a/b", ""))
                body = {"id": shown["id"] if shown else ONE, "kind": step, "name": name}
                path = "/label"
                if step == "undo":
                    path, body = "/undo", {}
                elif step == "correct":
                    path = "/correct"
                    story.append(told(client.get("/labelled").json()))
                    labelled = sorted(tmp_path.glob("photos*/**/*.jpg"))
                    corrected = name_id(labelled[0]) if labelled else ONE
                    body = {"id": corrected, "name": name or None}
                reply = client.post(path, json=body, headers=session)
                story.append([path, step, name, reply.status_code, *told(reply.json())])
        story.append(sorted(files_below(tmp_path)))
    check_golden(f"labelling/{seed}", story, pytestconfig)


def told(content: dict[str, Any]) -> list[Any]:
    """Return what a response shows, without the paths and ids of this run."""
    if "detail" in content:
        return []
    if "photographs" in content:
        shown = sorted(f"{one['name']} {one['held_out']}" for one in content["photographs"])
        return [shown, content["classes"]]
    photo = content["photograph"] or {}
    classes = [[one["name"], one["probability"]] for one in content["classes"]]
    numbers = [content["done"], content["left"], *re.findall(r"\d+", content["progress"])]
    return [*photo.values(), classes, content["next"], *numbers]
