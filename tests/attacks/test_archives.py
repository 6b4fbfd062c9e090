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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sopdeploy.bundle.archive import BLOCK, END, header, padding
from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.signing import make_key, sign, signature_path
from sopdeploy.bundle.transfer import pull, push
from sopdeploy.cli.app import app
from sopdeploy.errors import BundleError
from tests.forged import forge, write_hollow

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


TARS: dict[str, Callable[[bytes], bytes]] = {
    "a file above": lambda a: replaced_header(a, entry("../pwned")),
    "a file elsewhere": lambda a: replaced_header(a, entry(str(PWNED))),
    "a link out": lambda a: replaced_header(a, entry("certificate.json", tarfile.SYMTYPE, "/etc/passwd")),
    "a hard link": lambda a: replaced_header(a, entry("certificate.json", tarfile.LNKTYPE, "/etc/passwd")),
    "a device": lambda a: replaced_header(a, entry("certificate.json", tarfile.CHRTYPE)),
    "a folder": lambda a: replaced_header(a, entry("certificate.json", tarfile.DIRTYPE)),
    "a long name": lambda a: replaced_header(a, entry("certificate.json", tarfile.GNUTYPE_LONGNAME)),
    "an extended header": lambda a: replaced_header(a, entry("certificate.json", tarfile.XHDTYPE)),
    "a sparse file": lambda a: replaced_header(a, entry("certificate.json", tarfile.GNUTYPE_SPARSE)),
    "one more file": lambda a: a[: -len(END)] + header("more", 0) + END,
    "one file twice": lambda a: parts(a)[0] * 2 + parts(a)[1],
    "something behind the end": lambda a: a + b"more",
    "zeros behind the end": lambda a: a + bytes(BLOCK),
    "no end": lambda a: a[: -len(END)],
    "half of it": lambda a: a[: len(a) // 2],
    "something in the padding": lambda a: parts(a)[0][:-1] + b"x" + parts(a)[1],
    "a compressed one": lambda a: gzip.compress(a),
    "a plain tar of other files": lambda _: tar((entry("../pwned"), b"x")),
    "a tar of folders and links": lambda _: tar(
        (entry("a", tarfile.SYMTYPE, str(PWNED.parent)), b""), (entry("a/pwned"), b"x")
    ),
    "a manifest that is none": lambda _: header("manifest.json", 2) + b"{}" + padding(2) + END,
    "a manifest of gigabytes": lambda _: header("manifest.json", 8_000_000_000) + END,
    "a manifest of a negative size": lambda a: a[:124] + b"-0000000001\0" + a[136:],
    "a size that is no number": lambda a: a[:124] + b"\x80" + bytes(10) + b"\x05" + a[136:],
    "deep JSON": lambda _: header("manifest.json", 200_000) + b"[" * 200_000 + padding(200_000) + END,
    "nothing": lambda _: b"",
    "text": lambda _: b"trust me" * 200,
}


@pytest.mark.parametrize("attack", TARS)
def test_malicious_archives_are_rejected(archive: bytes, attack: str) -> None:
    assert ARCHIVE in rejection(TARS[attack](archive))


NAMES = [
    "../pwned", str(PWNED), "a/b", "..", ".", "", "a\\b", "manifest.json", "Manifest.JSON", "x" * 300,
    "x" * 150,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_with_an_unsafe_file_name_is_rejected(bundle: Path, tmp_path: Path, name: str) -> None:
    forged = tmp_path / "forged"
    forged.mkdir()
    for path in bundle.iterdir():
        (forged / path.name).write_bytes(path.read_bytes())
    files = json.loads((forged / "manifest.json").read_bytes())["files"]
    files[name] = {"bytes": 0, "sha256": "0" * 64}
    raw = (forge(forged, files=files) / "manifest.json").read_bytes()
    body = header("manifest.json", len(raw)) + raw + padding(len(raw)) + bytes(BLOCK * 100)
    rejection(body)


FUZZ = settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(data=st.data())
def test_every_changed_byte_is_detected(archive: bytes, bundle: Path, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(archive) - 1))
    changed = bytearray(archive)
    changed[place] ^= data.draw(st.integers(1, 255))
    Path("fuzzed.tar").write_bytes(changed)
    with pytest.raises(BundleError):
        pull("fuzzed.tar", Path("out"))
    assert list(Path("out").iterdir()) == []


def test_an_archive_above_the_size_limit_is_rejected(archive: bytes) -> None:
    assert "larger than 100 bytes" in rejection(archive, "--max-bytes", "100")


def test_another_sha256_is_rejected(archive: bytes) -> None:
    assert "not that of --sha256" in rejection(archive, "--sha256", "0" * 64)
    assert "64 hexadecimal digits" in rejection(archive, "--sha256", "abc")


@pytest.fixture
def signed(bundle: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A signed archive and its public key."""
    public = make_key(tmp_path / "release.key")
    sign(bundle, tmp_path / "release.key")
    try:
        return Path(push(bundle, str(tmp_path / "signed")).url), public
    finally:
        signature_path(bundle).unlink()


def signature_of(archive: Path) -> Path:
    return archive.with_name(archive.name + ".minisig")


def not_prehashed(text: str) -> str:
    comment, first, *rest = text.splitlines()
    body = b"Ed" + base64.b64decode(first)[2:]
    return "\n".join([comment, base64.b64encode(body).decode(), *rest])


SIGNATURES: dict[str, tuple[Callable[[str], str], str]] = {
    "nothing": (lambda _: "", "minisign's format"),
    "text": (lambda _: "trust me\n" * 4, "minisign's format"),
    "another comment": (lambda s: s.replace("bundle tiny", "bundle huge"), "does not match"),
    "no comment": (lambda s: "\n".join(s.splitlines()[:2]), "minisign's format"),
    "another signature": (lambda s: s.replace(s.splitlines()[1][30:40], "AAAAAAAAAA"), "does not match"),
    "a shorter signature": (lambda s: s.replace(s.splitlines()[1], "AAAA"), "minisign's format"),
    "a signature that is not prehashed": (not_prehashed, "not prehashed"),
    "control characters": (lambda s: s + "\x1b[31m", "minisign's format"),
}


@pytest.mark.parametrize("attack", SIGNATURES)
def test_invalid_signatures_are_rejected(signed: tuple[Path, Path], attack: str) -> None:
    archive, public = signed
    change, said = SIGNATURES[attack]
    text = signature_of(archive).read_text()
    body = archive.read_bytes()
    Path(ARCHIVE + ".minisig").write_text(change(text))
    assert said in rejection(body, "--verify-key", str(public))


def test_missing_and_foreign_signatures_are_rejected(
    signed: tuple[Path, Path], bundle: Path, tmp_path: Path
) -> None:
    archive, public = signed
    body = archive.read_bytes()
    assert "no signature beside it" in rejection(body, "--verify-key", str(public))
    other = write_hollow(tmp_path / "others", config={"width": 5})
    Path(ARCHIVE + ".minisig").write_text(sign(other, tmp_path / "release.key").read_text())
    assert "does not match" in rejection(body, "--verify-key", str(public))
    Path(ARCHIVE + ".minisig").write_bytes(signature_of(archive).read_bytes())
    assert "another key" in rejection(body, "--verify-key", str(make_key(tmp_path / "second.key")))
    Path(ARCHIVE + ".minisig").write_bytes(b"\xff" * 100)
    assert "minisign's format" in rejection(body, "--verify-key", str(public))
    Path(ARCHIVE + ".minisig").write_bytes(b"x" * 5000)
    assert "larger than" in rejection(body, "--verify-key", str(public))


def test_the_original_archive_is_accepted(signed: tuple[Path, Path]) -> None:
    archive, public = signed
    pulled = pull(str(archive), Path("out"), verify_key=public)
    assert open_bundle(pulled.path).name == pulled.path.name
