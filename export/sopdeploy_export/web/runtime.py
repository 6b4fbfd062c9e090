"""The files of onnxruntime-web that a page needs, from the npm registry that npm is set to."""

import base64
import hashlib
import shutil
import subprocess
import tarfile
from pathlib import Path

from sopdeploy.errors import RuntimeUnavailableError

VERSION = "1.30.0"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
WEBGPU_FILES = (
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)


def fetch_runtime(folder: Path, *, webgpu: bool) -> None:
    """Get onnxruntime-web `VERSION` from npm's registry or cache, and write its files to *folder*.

    With *webgpu*, these are also `WEBGPU_FILES`. Raises `RuntimeUnavailableError` without npm, without the
    package, or if its SHA-512 is not `SHA512`.
    """
    npm, archive = shutil.which("npm"), folder / f"onnxruntime-web-{VERSION}.tgz"
    if npm is None:
        raise RuntimeUnavailableError("npm, which downloads onnxruntime-web, was not found; install Node.js")
    command = [npm, "pack", f"onnxruntime-web@{VERSION}", "--prefer-offline", "--loglevel=error"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode or not archive.is_file():
        problem = (done.stderr.strip() or "it wrote no file").splitlines()[0]
        raise RuntimeUnavailableError(
            f"npm cannot download onnxruntime-web {VERSION} ({problem}); check npm's setting `registry`"
        )
    content = archive.read_bytes()
    if hashlib.sha512(content).digest() != base64.b64decode(SHA512):
        raise RuntimeUnavailableError(
            f"onnxruntime-web {VERSION} is not the published file; check npm's setting `registry`"
        )
    with tarfile.open(archive) as package:
        for name in _FILES + WEBGPU_FILES * webgpu:
            with (folder / name).open("wb") as file:
                shutil.copyfileobj(package.extractfile(f"package/dist/{name}"), file)  # type: ignore[arg-type]
    archive.unlink()
