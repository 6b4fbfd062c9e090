"""Push, pull and sign with folders and object stores."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from sopdeploy.bundle.archive import download
from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.signing import (
    check_signature,
    read_signature,
    signature_path,
    write_signature,
)
from sopdeploy.errors import BundleError, ConfigError, MissingPackageError, StorageError
from sopdeploy.files import writing
from sopdeploy_commands.app import app
from sopdeploy_commands.bundles.transfer import pull, push
from tests.support.children import START_SECONDS, serving, spawn
from tests.support.forged import FIELDS, forge, write_hollow
from tests.support.keys import write_key
from tests.support.service import write_bundle
from tests.support.small_data import jpeg

EARLIER, LATER = "2025-12-31T23:59:59.000000Z", "2026-02-03T04:05:06.000000Z"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_hollow(tmp_path / "bundles")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "release.key"
    write_key(path)
    return path


def cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in arguments])


def cli_error(*arguments: str | Path) -> str:
    """Run a command that must fail with one line on stderr and return the line."""
    result = cli(*arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    return result.stderr


def test_a_full_disk_leaves_no_part_of_an_archive(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy_half(source: Path | str, target: Path | str, **_options: Any) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "shelf").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", copy_half)
        with pytest.raises(StorageError, match="No space left"):
            push(bundle, f"file://{tmp_path}/shelf")
    assert not list((tmp_path / "shelf").iterdir())
    assert cli("push", bundle, f"file://{tmp_path}/shelf").exit_code == 0
    assert len(list((tmp_path / "shelf").iterdir())) == 1


def check(bundle: Path, signature: Path, key: Path) -> None:
    check_signature(open_bundle(bundle), read_signature(signature, bundle), key)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_bundle_is_pulled_from_a_folder_unchanged(bundle: Path, tmp_path: Path) -> None:
    pushed = push(bundle, str(tmp_path / "shared" / "models"))
    pulled = pull(pushed.url, tmp_path / "here", sha256=pushed.sha256)
    assert pulled.path == tmp_path / "here" / bundle.name
    assert contents(pulled.path) == contents(bundle)
    assert pull(pushed.url, tmp_path / "here").path == pulled.path  # keeps the existing bundle
    assert {path.name for path in (tmp_path / "here").iterdir()} == {bundle.name, "latest"}
    assert [path.name for path in (tmp_path / "shared" / "models").iterdir()] == [
        f"{bundle.name}.tar"
    ]


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 224 * 224 * 3], ids=str)
def test_a_file_of_any_size_is_pulled_unchanged(size: int, tmp_path: Path) -> None:
    def resize(folder: Path) -> None:
        (folder / "parity.json").write_bytes(bytes(size))

    bundle = write_hollow(tmp_path, resize)
    pulled = pull(push(bundle, str(tmp_path / "shared")).url, tmp_path / "here")
    assert contents(pulled.path) == contents(bundle)


def test_archives_are_reproducible_standard_tar_files_without_owners(
    bundle: Path, tmp_path: Path
) -> None:
    first = push(bundle, str(tmp_path / "a"))
    copied = Path(shutil.copytree(bundle, tmp_path / "another name"))
    for path in copied.iterdir():
        path.chmod(0o600)
        os.utime(path, (1, 1))
    (copied / "notes.txt").write_text("not of the bundle")
    second = push(copied, str(tmp_path / "b"))

    assert Path(first.url).read_bytes() == Path(second.url).read_bytes()
    assert (first.sha256, first.bytes) == (second.sha256, Path(second.url).stat().st_size)
    with tarfile.open(first.url) as archive:
        entries = archive.getmembers()
        names = [entry.name for entry in entries]
        assert names == ["manifest.json", *sorted(names[1:])]
        facts = {(e.type, e.mode, e.mtime, e.uid, e.gid, e.uname) for e in entries}
        assert facts == {(tarfile.REGTYPE, 0o644, 0, 0, 0, "")}
        found = {entry.name: archive.extractfile(entry) for entry in entries}
        assert {name: file.read() for name, file in found.items() if file} == contents(bundle)


@pytest.mark.parametrize("store", ["a/models", "memory://models/full"])
def test_a_download_to_a_full_disk_is_not_an_error_of_the_bundle(
    store: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = push(bundle, store).url
    message = r"/dev/full: cannot be written \(No space left on device\)"
    with Path("/dev/full").open("wb", 0) as full, pytest.raises(StorageError, match=message):
        download(url, full, 10**9, Path("/dev/full"))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            OSError(errno.ENOSPC, "Error writing bytes. Detail: [errno 28]"),
            os.strerror(errno.ENOSPC),
        ),  # PyArrow's
        (OSError("the connection is closed\nand more"), "the connection is closed"),
    ],
)
def test_the_reason_why_a_file_cannot_be_written_is_that_of_the_system(
    error: OSError, reason: str
) -> None:
    with (
        pytest.raises(StorageError, match=rf"rows: cannot be written \({reason}\); "),
        writing("rows"),
    ):
        raise error


@pytest.mark.parametrize("store", ["a/models", "memory://models/flowers"])
def test_a_signature_is_pushed_with_its_bundle_and_checked_on_pull(
    store: str, bundle: Path, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    public = key.with_name("release.key.pub")
    write_signature(bundle, key)
    pushed = push(bundle, store)
    assert (pushed.signed, pushed.url) == (True, f"{store}/{bundle.name}.tar")
    pulled = pull(pushed.url, tmp_path / "here", require_signature=public)
    assert pulled.verified
    assert contents(pulled.path) == contents(bundle)
    assert signature_path(pulled.path).read_bytes() == signature_path(bundle).read_bytes()
    check(pulled.path, signature_path(pulled.path), public)


@pytest.mark.parametrize(
    "text", ["", "no key", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"]
)
def test_invalid_key_files_are_rejected(
    text: str, bundle: Path, key: Path, tmp_path: Path
) -> None:
    signature, file = write_signature(bundle, key), tmp_path / "other"
    file.write_text(text)
    with pytest.raises(ConfigError, match="not a PEM file with a private"):
        write_signature(bundle, file)
    with pytest.raises(ConfigError, match="not a PEM file with a public"):
        check(bundle, signature, file)
    with pytest.raises(ConfigError, match="key file cannot be read"):
        check(bundle, signature, tmp_path / "none")


@pytest.mark.slow
def test_model_signing_and_sopdeploy_accept_each_others_signatures(
    bundle: Path, key: Path, tmp_path: Path
) -> None:
    def model_signing(*arguments: object) -> str:
        command = [sys.executable, "-m", "model_signing", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    public, theirs = key.with_name("release.key.pub"), tmp_path / "theirs.sig"
    verify = ("verify", "key", bundle, "--public_key", public, "--signature")
    assert "Verification succeeded" in model_signing(*verify, write_signature(bundle, key))
    model_signing("sign", "key", bundle, "--private_key", key, "--signature", theirs)
    check(bundle, theirs, public)

    for name in sorted(path.name for path in bundle.iterdir()):
        other = Path(shutil.copytree(bundle, tmp_path / name))
        if name == "manifest.json":
            forge(other, exported_at=LATER)
        else:
            content = (other / name).read_bytes()
            (other / name).write_bytes(content + b"\n")
            forge(other, bound=False)  # the manifest has the right hashes
        with pytest.raises(BundleError, match=r"is not valid \(Signature mismatch"):
            check(other, theirs, public)
        if name == "model.onnx":
            verify_other = ("verify", "key", other, "--public_key", public, "--signature")
            assert "Verification succeeded" not in model_signing(*verify_other, theirs)

    check(bundle, theirs, public)


def another_time(bundle: Path, folder: Path, time: str) -> Path:
    """Copy *bundle* into *folder*, as if it had been exported at *time*."""
    folder.mkdir()
    return forge(Path(shutil.copytree(bundle, folder / bundle.name)), exported_at=time)


@pytest.mark.parametrize(
    "time", [FIELDS["exported_at"], EARLIER, LATER], ids=["same", "earlier", "later"]
)
def test_a_pull_never_changes_a_bundle_that_is_there(
    time: str, bundle: Path, key: Path, tmp_path: Path
) -> None:
    write_signature(bundle, key)
    public, here = key.with_name("release.key.pub"), tmp_path / "here"
    path = pull(push(bundle, str(tmp_path / "store")).url, here, require_signature=public).path
    before = contents(path)
    copy = another_time(bundle, tmp_path / "copied", time)
    again = pull(push(copy, str(tmp_path / "copies")).url, here)

    assert (again.path, again.is_new, contents(path)) == (path, False, before)
    check(path, signature_path(path), public)
    if time != FIELDS["exported_at"]:
        write_signature(copy, key)
        other = push(copy, str(tmp_path / "copies")).url
        with pytest.raises(
            BundleError, match=r"exported at .*, but the signed copy at .*; move this folder"
        ):
            pull(other, here, require_signature=public)
        assert contents(path) == before
        check(path, signature_path(path), public)


def test_an_export_does_not_invalidate_a_signature(
    bundle: Path, key: Path, tmp_path: Path
) -> None:
    write_signature(bundle, key)
    assert write_hollow(bundle.parent) == bundle  # the same content and time
    with pytest.raises(
        BundleError, match=r"exists, signed with the time of its export; move .*\.sig"
    ):
        write_hollow(bundle.parent, exported_at=LATER)
    check(bundle, signature_path(bundle), key.with_name("release.key.pub"))


def test_a_signed_bundle_is_not_accepted_under_the_name_of_another(
    bundle: Path, key: Path, tmp_path: Path
) -> None:
    public, here = key.with_name("release.key.pub"), tmp_path / "here"
    cats, old, alias = (
        write_hollow(tmp_path / "bundles", **fields)
        for fields in (
            {"project": "cats"},
            {"config": {"width": 5}, "exported_at": EARLIER},
            {"project": bundle.name},
        )
    )

    for other in (cats, old, alias):
        write_signature(other, key)
        archive = Path(push(other, str(tmp_path / other.name)).url)
        for name in (f"{bundle.name}.tar", "dogs.tar", "latest.tar"):
            replaced = tmp_path / name
            for suffix in ("", ".sig"):
                shutil.copyfile(f"{archive}{suffix}", f"{replaced}{suffix}")
            with pytest.raises(
                BundleError,
                match=f"contains {other.name}, not {replaced.stem}; check the address; try",
            ):
                pull(str(replaced), here, require_signature=public)
            assert not here.exists()

    for name, project in (("cats.tar", None), ("latest.tar", "cats")):
        for suffix in ("", ".sig"):
            shutil.copyfile(
                f"{tmp_path / cats.name / cats.name}.tar{suffix}", f"{tmp_path / name}{suffix}"
            )
        pull(
            str(tmp_path / name), tmp_path / name[:4], project=project, require_signature=public
        )


def test_a_bundle_older_than_the_newest_of_its_project_needs_a_flag(
    bundle: Path, tmp_path: Path
) -> None:
    old = write_hollow(tmp_path / "bundles", config={"width": 5}, exported_at=EARLIER)
    cats = write_hollow(tmp_path / "bundles", project="cats", exported_at=EARLIER)
    here, store = tmp_path / "here", str(tmp_path / "store")
    pull(push(bundle, store).url, here)
    pull(push(cats, store).url, here)  # of another project
    archive = push(old, store).url
    error = cli_error("pull", archive, here)

    for part in (
        archive,
        old.name,
        EARLIER,
        bundle.name,
        FIELDS["exported_at"],
        "try --allow-older",
    ):
        assert part in error

    assert not (here / old.name).exists()
    assert pull(archive, here, allow_older=True).path.name == old.name
    with pytest.raises(BundleError, match="try allow_older=True"):
        pull(archive, here)
    later = push(another_time(old, tmp_path / "later", LATER), str(tmp_path / "replayed")).url

    with pytest.raises(
        BundleError, match="try allow_older=True"
    ):  # the bundle that is there keeps its time
        pull(later, here)


def test_an_unusable_store_or_destination_is_one_error_line(
    bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert "file" in cli_error("push", bundle, tmp_path / "file")
    assert bundle.name in cli_error("pull", bundle, tmp_path / "x")
    for url in ("memory://models/none.tar", "nosuchstore://models/x.tar"):
        assert url in cli_error("pull", url, tmp_path / "x")


def test_the_commands_print_what_they_did(bundle: Path, key: Path, tmp_path: Path) -> None:
    signed = cli("sign", bundle, "--key", key)
    assert signed.exit_code == 0, signed.stderr
    assert f"signed   {signature_path(bundle)}" in signed.stdout
    pushed: Any = json.loads(cli("push", bundle, tmp_path / "a", "--json").stdout)
    assert pushed["signed"] is True
    text = cli("push", bundle, tmp_path / "a").stdout
    assert pushed["sha256"] in text
    assert "with its signature" in text
    options = ("--require-signature", f"{key}.pub", "--sha256", pushed["sha256"])
    pulled = cli("pull", pushed["url"], tmp_path / "here", *options)
    assert "(signature and hashes checked)" in pulled.stdout


@pytest.mark.slow
def test_a_pulled_bundle_is_served_with_the_key_that_signed_it_and_with_no_other(
    key: Path, tmp_path: Path
) -> None:
    bundle, other = write_bundle(tmp_path / "bundles"), write_key(tmp_path / "other.key")
    assert cli("sign", bundle, "--key", key).exit_code == 0
    url = json.loads(cli("push", bundle, tmp_path / "store", "--json").stdout)["url"]
    required, received = ("--require-signature", f"{key}.pub"), str(tmp_path / "received")

    assert cli("pull", url, received, *required).exit_code == 0
    with serving(received, *required) as client:
        assert client.post("/v1/classify", content=jpeg(0)).json()["classes"]
    with spawn(received, "--require-signature", str(other)) as refused:
        out, error = refused.communicate(timeout=START_SECONDS)

    assert (refused.returncode, out, error.count("\n")) == (2, "", 1)
    assert f"received/{bundle.name}: its signature is not valid" in error
    assert "Key mismatch" in error


IN_THE_WAY: dict[str, Callable[[Path], object]] = {
    "a broken link": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a file": lambda path: path.symlink_to(__file__),
    "a file": lambda path: path.write_text("content"),
    "an empty folder": lambda path: path.mkdir(),
    "a folder with a file": lambda path: (path / "deeper").mkdir(parents=True),
    "a FIFO": os.mkfifo,
    "a folder as signature": lambda path: (path.parent / f"{path.name}.sig" / "deeper").mkdir(
        parents=True
    ),
}


@pytest.mark.parametrize("case", IN_THE_WAY)
def test_what_has_the_name_of_the_bundle_stays_and_is_one_error_line(
    case: str, bundle: Path, key: Path, tmp_path: Path
) -> None:
    write_signature(bundle, key)
    url, here = push(bundle, str(tmp_path / "store")).url, tmp_path / "here"
    here.mkdir()
    IN_THE_WAY[case](here / bundle.name)
    before = sorted(here.iterdir())
    error = cli_error("pull", url, here, "--require-signature", f"{key}.pub")
    assert bundle.name in error
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize(
    "code", [errno.EBUSY, errno.ENOSPC, errno.EACCES, errno.ETXTBSY, errno.EIO, errno.ESTALE]
)
@pytest.mark.parametrize("operation", ["replace", "rename", "chmod", "write_bytes"])
def test_a_pull_that_fails_leaves_neither_an_unsigned_bundle_nor_a_traceback(
    operation: str,
    code: int,
    bundle: Path,
    key: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_signature(bundle, key)
    url, here = push(bundle, str(tmp_path / "store")).url, tmp_path / "here"

    def fail(path: Path, *_: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, operation, fail)
    error = cli_error("pull", url, here, "--require-signature", f"{key}.pub")
    assert os.strerror(code) in error
    assert not here.exists()


MISSING_CLIENTS = [
    ("s3://bucket/a-0.tar", "s3fs", 's3fs is not installed; run: pip install "sopdeploy[s3]"'),
    (
        "https://example.org/a-0.tar",
        "aiohttp",
        'aiohttp is not installed; run: pip install "sopdeploy[s3]"',
    ),
    ("gs://bucket/a-0.tar", "gcsfs", "gcsfs"),
]


@pytest.mark.parametrize("command", ["push", "pull"])
@pytest.mark.parametrize(("address", "module", "message"), MISSING_CLIENTS)
def test_a_client_of_a_store_that_is_not_installed_is_named_with_its_extra(
    command: str,
    address: str,
    module: str,
    message: str,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    monkeypatch.setattr(import_module("fsspec.registry"), "_registry", {})
    with pytest.raises(MissingPackageError, match=re.escape(message)) as error:
        push(bundle, address) if command == "push" else pull(address, tmp_path / "pulled")

    assert error.value.code == "not_installed"


IN_PHOTOGRAPHS = {
    "class folders": ("cat/1.jpg", "."),
    "a heap": ("1.jpg", "."),
    "classes of a part": ("train/cat/1.jpg", "."),
    "a class": ("cat/1.jpg", "cat"),
}


@pytest.mark.parametrize("case", IN_PHOTOGRAPHS)
def test_a_bundle_is_not_pulled_into_photographs(
    case: str, bundle: Path, tmp_path: Path
) -> None:
    image, destination = IN_PHOTOGRAPHS[case]
    photos = tmp_path / "photos"
    (photos / image).parent.mkdir(parents=True)
    (photos / image).write_bytes(jpeg(0, (8, 8)))
    archive = push(bundle, str(tmp_path / "store")).url
    before = sorted(photos.rglob("*"))
    with pytest.raises(ConfigError, match="holds photos; choose a folder outside"):
        pull(archive, photos / destination)
    assert sorted(photos.rglob("*")) == before
