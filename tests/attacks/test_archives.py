"""Malicious archives and signatures: `sopdeploy pull` rejects each with one line and leaves no files."""

import base64
import gzip
import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sopdeploy.bundle.archive import BLOCK, END, header, padding
from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.signing import signature_path, write_signature
from sopdeploy.errors import BundleError
from sopdeploy_commands.app import app
from sopdeploy_commands.bundles.transfer import pull, push
from tests.support.forged import forge, write_hollow
from tests.support.keys import write_key

ARCHIVE = "tiny.tar"
PWNED = Path(tempfile.gettempdir()) / "pwned"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hollow(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def archive(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return Path(push(bundle, str(tmp_path_factory.mktemp("pushed"))).url).read_bytes()


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rejection(body: bytes, *options: str) -> str:
    """Pull the archive *body*, which must fail with one line and write nothing; return the line."""
    Path(ARCHIVE).write_bytes(body)
    before = all_files()
    result = CliRunner().invoke(app, ["pull", ARCHIVE, "out", *options])
    assert result.exit_code == 2, result.output or repr(result.exception)
    assert (result.stdout, result.stderr.count("\n")) == ("", 1)
    assert all_files() - before <= {Path("out")}
    assert not PWNED.exists()
    return result.stderr


def all_files() -> set[Path]:
    return set(Path().rglob("*"))


def tar(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for entry, body in entries:
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
    return file.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, target
    return found


def parts(archive: bytes) -> tuple[bytes, bytes]:
    """Split *archive* after the manifest entry."""
    size = int(archive[124:135], 8)
    end = BLOCK + size + len(padding(size))
    return archive[:end], archive[end:]


def replaced_header(archive: bytes, entry: tarfile.TarInfo) -> bytes:
    """Replace the header of the first file after the manifest with *entry*."""
    first, rest = parts(archive)
    entry.size = int(rest[124:135], 8)
    return first + entry.tobuf(tarfile.USTAR_FORMAT) + rest[BLOCK:]


OTHERS, NONE = (
    "is not packed as `sopdeploy push` packs it",
    "not an archive of `sopdeploy push`",
)
TARS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a file above": (lambda a: replaced_header(a, entry("../pwned")), OTHERS),
    "a link out": (
        lambda a: replaced_header(a, entry("certificate.json", tarfile.SYMTYPE, "/etc/passwd")),
        OTHERS,
    ),
    "one more file": (lambda a: a[: -len(END)] + header("more", 0) + END, OTHERS),
    "one file twice": (lambda a: parts(a)[0] * 2 + parts(a)[1], OTHERS),
    "something behind the end": (lambda a: a + b"more", OTHERS),
    "no end": (lambda a: a[: -len(END)], OTHERS),
    "something in the padding": (lambda a: parts(a)[0][:-1] + b"x" + parts(a)[1], OTHERS),
    "a compressed one": (gzip.compress, NONE),
    "a plain tar of other files": (
        lambda _: tar((entry("../pwned"), b"x")),
        "does not begin with a manifest",
    ),
    "a manifest that is none": (lambda _: manifest_of(2, b"{}"), ": missing"),
    "a manifest of gigabytes": (
        lambda _: manifest_of(8_000_000_000),
        "does not begin with a manifest",
    ),
    "a size that is no number": (
        lambda a: a[:124] + b"\x80" + bytes(10) + b"\x05" + a[136:],
        NONE,
    ),
    "deep JSON": (lambda _: manifest_of(200_000, b"[" * 200_000), "not JSON"),
}


def manifest_of(size: int, content: bytes = b"") -> bytes:
    return header("manifest.json", size) + content + padding(len(content)) + END


@pytest.mark.parametrize("attack", TARS)
def test_malicious_archives_are_rejected(archive: bytes, attack: str) -> None:
    change, message = TARS[attack]
    line = rejection(change(archive))
    assert ARCHIVE in line
    assert message in line


@pytest.mark.parametrize("name", ["../pwned", "a\\b"])
def test_a_manifest_with_an_unsafe_file_name_is_rejected(
    bundle: Path, tmp_path: Path, name: str
) -> None:
    forged = tmp_path / "forged"
    forged.mkdir()
    for path in bundle.iterdir():
        (forged / path.name).write_bytes(path.read_bytes())
    files = json.loads((forged / "manifest.json").read_bytes())["files"]
    files[name] = {"bytes": 0, "sha256": "0" * 64}
    raw = (forge(forged, files=files) / "manifest.json").read_bytes()
    body = header("manifest.json", len(raw)) + raw + padding(len(raw)) + bytes(BLOCK * 100)
    assert f"the manifest names {name!r}, which is not a plain file name" in rejection(body)


@settings(max_examples=30)
@given(data=st.data())
def test_every_changed_byte_is_detected(
    archive: bytes, bundle: Path, data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(archive) - 1))
    changed = bytearray(archive)
    changed[place] ^= data.draw(st.integers(1, 255))
    Path("fuzzed.tar").write_bytes(changed)
    with pytest.raises(BundleError):
        pull("fuzzed.tar", Path("out"))
    assert not Path("out").exists()


def test_another_sha256_and_an_archive_above_the_size_limit_are_rejected(
    archive: bytes, monkeypatch
) -> None:
    assert "check both and download it again" in rejection(archive, "--sha256", "0" * 64)
    assert "64 hexadecimal digits" in rejection(archive, "--sha256", "abc")
    monkeypatch.setattr("sopdeploy.bundle.archive.MAX_ARCHIVE_BYTES", 100)
    assert "larger than 100 bytes" in rejection(archive)


@pytest.fixture
def signed(bundle: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A signed archive and its public key."""
    public = write_key(tmp_path / "release.key")
    write_signature(bundle, tmp_path / "release.key")
    try:
        return Path(push(bundle, str(tmp_path / "signed")).url), public
    finally:
        signature_path(bundle).unlink()


def signature_of(archive: Path) -> Path:
    return archive.with_name(archive.name + ".sig")


def change_payload(text: str) -> str:
    """Allow another hash of a file, but keep the signature."""
    signature = json.loads(text)
    payload = json.loads(base64.b64decode(signature["dsseEnvelope"]["payload"]))
    payload["predicate"]["resources"][0]["digest"] = "0" * 64
    signature["dsseEnvelope"]["payload"] = base64.b64encode(
        json.dumps(payload).encode()
    ).decode()
    return json.dumps(signature)


SIGNATURES: dict[str, tuple[Callable[[str], str], str]] = {
    "nothing": (lambda _: "", "is not valid"),
    "no signature": (lambda _: "{}", "is not valid"),
    "another payload": (change_payload, "is not valid"),
    "deep JSON": (lambda _: "[" * 100_000, "is not valid"),
    "no text": (lambda _: "\udcff" * 100, "is not valid"),
    "a megabyte": (lambda _: "x" * 1_000_001, "larger than"),
}


def test_invalid_missing_and_foreign_signatures_are_rejected_and_the_original_is_accepted(
    signed: tuple[Path, Path], bundle: Path, tmp_path: Path
) -> None:
    archive, public = signed
    body = archive.read_bytes()
    assert "no signature beside it" in rejection(body, "--require-signature", str(public))

    for change, message in SIGNATURES.values():
        changed = change(signature_of(archive).read_text())
        Path(ARCHIVE + ".sig").write_text(changed, errors="surrogateescape")
        assert message in rejection(body, "--require-signature", str(public))
    other = write_hollow(tmp_path / "others", config={"width": 5})
    Path(ARCHIVE + ".sig").write_text(
        write_signature(other, tmp_path / "release.key").read_text()
    )

    assert "Signature mismatch" in rejection(body, "--require-signature", str(public))
    Path(ARCHIVE + ".sig").write_bytes(signature_of(archive).read_bytes())
    assert "Key mismatch" in rejection(
        body, "--require-signature", str(write_key(tmp_path / "second.key"))
    )

    pulled = pull(str(archive), Path("out"), require_signature=public)
    assert open_bundle(pulled.path).name == pulled.path.name
