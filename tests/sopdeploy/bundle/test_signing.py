"""Signatures that the command of the `model-signing` package writes, and bundles served with them."""

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.signing import check_signature, read_signature, signature_path
from sopdeploy.errors import BundleError, ConfigError
from tests.support.children import START_SECONDS, serving, spawn
from tests.support.forged import forge, write_hollow
from tests.support.keys import sign, write_key
from tests.support.service import write_bundle
from tests.support.small_data import jpeg

LATER = "2026-02-03T04:05:06.000000Z"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_hollow(tmp_path / "bundles")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "release.key"
    write_key(path)
    return path


@pytest.fixture
def public(key: Path) -> Path:
    return key.with_name(f"{key.name}.pub")


def check(bundle: Path, key: Path) -> None:
    """Check the signature beside *bundle*, as a server does."""
    check_signature(open_bundle(bundle), read_signature(signature_path(bundle), bundle), key)


def model_signing(*arguments: object) -> str:
    command = [sys.executable, "-m", "model_signing", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@pytest.mark.slow
def test_a_server_takes_the_package_s_signature_and_no_other_key(
    key: Path, public: Path, tmp_path: Path
) -> None:
    written = write_bundle(tmp_path / "bundles")
    signature = signature_path(written)
    printed = model_signing(
        "sign", "key", written, "--private_key", key, "--signature", signature
    )
    assert "succeeded" in printed

    # The folder with its signature, on another machine
    received = shutil.copytree(tmp_path / "bundles", tmp_path / "received", symlinks=True)
    with serving(str(received), "--set", f"require_signature={public}") as client:
        assert client.post("/v1/classify", content=jpeg(0)).json()["classes"]

    other = write_key(tmp_path / "other.key")
    with spawn(str(received), "--set", f"require_signature={other}") as refused:
        out, error = refused.communicate(timeout=START_SECONDS)
    assert refused.returncode == 2
    assert out == ""
    assert error.count("\n") == 1
    assert written.name in error


def test_another_content_of_any_file_is_not_what_was_signed(
    bundle: Path, key: Path, public: Path, tmp_path: Path
) -> None:
    sign(bundle, key)
    for name in sorted(path.name for path in bundle.iterdir()):
        other = Path(shutil.copytree(bundle, tmp_path / name / bundle.name))
        shutil.copyfile(signature_path(bundle), signature_path(other))
        if name == "manifest.json":
            forge(other, exported_at=LATER)
        else:
            content = (other / name).read_bytes()
            (other / name).write_bytes(content + b"\n")
            forge(other, bound=False)  # the manifest has the right hashes
        with pytest.raises(BundleError):
            check(other, public)

    check(bundle, public)


def test_an_export_does_not_invalidate_a_signature(
    bundle: Path, key: Path, public: Path
) -> None:
    sign(bundle, key)
    assert write_hollow(bundle.parent) == bundle  # the same content and time
    with pytest.raises(BundleError, match=signature_path(bundle).name):
        write_hollow(bundle.parent, exported_at=LATER)

    check(bundle, public)


@pytest.mark.parametrize(
    "text", ["", "no key", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"]
)
def test_invalid_key_files_are_rejected(
    text: str, bundle: Path, key: Path, tmp_path: Path
) -> None:
    sign(bundle, key)
    file = tmp_path / "other"
    file.write_text(text)

    for path in (file, tmp_path / "none"):
        with pytest.raises(ConfigError, match=path.name):
            check(bundle, path)


def change_payload(text: str) -> str:
    """Allow another hash of a file, but keep the signature."""
    signature = json.loads(text)
    payload = json.loads(base64.b64decode(signature["dsseEnvelope"]["payload"]))
    payload["predicate"]["resources"][0]["digest"] = "0" * 64
    signature["dsseEnvelope"]["payload"] = base64.b64encode(
        json.dumps(payload).encode()
    ).decode()
    return json.dumps(signature)


CHANGES: dict[str, Callable[[str], str]] = {
    "nothing": lambda _: "",
    "not a signature": lambda _: "{}",
    "another payload": change_payload,
    "deep JSON": lambda _: "[" * 100_000,
    "not text": lambda _: "\udcff" * 100,
    "a megabyte": lambda _: "x" * 1_000_001,
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_invalid_signature_is_rejected(
    change: str, bundle: Path, key: Path, public: Path
) -> None:
    text = sign(bundle, key).read_text()
    check(bundle, public)
    signature_path(bundle).write_text(CHANGES[change](text), errors="surrogateescape")

    with pytest.raises(BundleError):
        check(bundle, public)


def test_a_missing_and_a_foreign_signature_are_rejected(
    bundle: Path, key: Path, public: Path, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="no signature"):
        check(bundle, public)

    other = write_hollow(tmp_path / "others", config={"width": 5})
    shutil.copyfile(sign(other, key), signature_path(bundle))
    with pytest.raises(BundleError, match="Signature mismatch"):
        check(bundle, public)

    sign(bundle, key)
    with pytest.raises(BundleError, match="Key mismatch"):
        check(bundle, write_key(tmp_path / "second.key"))
