"""Write a folder of static files that classifies images in a browser, and check it in Chromium."""

import hashlib
import json
import shutil
import statistics
from pathlib import Path

from sopdeploy.bundle.folder import Bundle, staging
from sopdeploy.bundle.manifest import to_json
from sopdeploy.config import StrictModel
from sopdeploy.errors import BundleError, ConfigError, ParityError
from sopdeploy.files import sha256
from sopdeploy_export.web.chromium import find_chromium, run_check
from sopdeploy_export.web.examples import write_examples
from sopdeploy_export.web.runtime import WEBGPU_FILES, fetch_runtime

_PAGE = Path(__file__).with_name("page")
_FIELDS = {"project", "inputs", "outputs", "preprocess", "decision", "stability"}  # of the manifest


class Site(StrictModel):
    """The folder that was written, the bytes of the page in it, and the number of steps that were replayed.

    `ms_pixels` is the median time of decoding and resizing a golden example in Chromium, `ms_network` that of
    the network, in milliseconds.
    """

    path: Path
    bundle: str
    bytes: int
    steps: int
    ms_pixels: float
    ms_network: float


def write_site(bundle: Bundle, out: Path, browser: str | None = None, *, webgpu: bool = False) -> Site:
    """Write *bundle* as a page to the new folder *out*, if its examples replay in Chromium (*browser*).

    With *webgpu*, the page may use the GPU, and the first example is also replayed with WebGPU. Raises
    `BundleError` for a bundle that browsers cannot run, `RuntimeUnavailableError` without Chromium or
    onnxruntime-web, and `ParityError`, which names the first step that differs.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists; remove it or choose another folder", setting="out")
    program = find_chromium(browser)
    with staging(out.absolute().parent) as folder:
        steps = fill_site(bundle, folder, webgpu=webgpu)
        report = run_check(folder, program, webgpu=webgpu)
        if report.failure or report.steps != steps:
            failure = report.failure or f"{report.steps} of {steps} steps were replayed"
            raise ParityError(f"{failure}; nothing was written; export in fp32, or name another Chromium")
        folder.chmod(0o755)
        folder.rename(out)
    pixels, network = (statistics.median(times) for times in zip(*report.ms, strict=True))
    size = sum(file.stat().st_size for file in out.iterdir() if file.is_file())
    return Site(path=out, bundle=bundle.name, bytes=size, steps=steps, ms_pixels=pixels, ms_network=network)


def fill_site(bundle: Bundle, folder: Path, *, webgpu: bool = False) -> int:
    """Write all files of the page to *folder*, unchecked; return the number of steps of the check."""
    manifest = bundle.manifest
    if manifest.precision not in {"fp32", "int8"}:
        raise BundleError(
            f"{bundle.path}: browsers do not run {manifest.precision}; export the checkpoint again",
            remedies={"precision": "fp32"},
        )
    fetch_runtime(folder, webgpu=webgpu)
    shutil.copytree(_PAGE, folder, dirs_exist_ok=True)
    shutil.copyfile(bundle.onnx, folder / bundle.onnx.name)
    fields = manifest.model_dump(mode="json", include=_FIELDS, exclude={"decision": {"reference"}})
    (folder / "site.json").write_bytes(
        to_json({"id": manifest.id, "labels": bundle.labels, "webgpu": webgpu, **fields})
    )
    (folder / "check").mkdir()
    steps = write_examples(bundle, folder / "check") + webgpu
    names = sorted({file.name for file in folder.iterdir() if file.is_file()}.difference(WEBGPU_FILES))
    names += ["check/check.json", *(f"check/{file.name}" for file in (folder / "check").glob("*.input"))]
    # A browser keeps these files, and fetches them again if the script differs.
    version = hashlib.sha256("".join(sha256(folder / name) for name in names).encode()).hexdigest()
    worker = folder / "worker.js"
    first = f"const [VERSION, FILES] = {json.dumps([version, ['./', *names]])};\n"
    worker.write_text(first + worker.read_text(encoding="utf-8"), encoding="utf-8")
    return steps
