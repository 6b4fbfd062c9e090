"""Write a folder of static files that classifies images in a browser, and check it in Chromium."""

import hashlib
import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

from sopdeploy.bundle.folder import Bundle, staging
from sopdeploy.bundle.manifest import to_json
from sopdeploy.config import StrictModel
from sopdeploy.errors import BundleError, ConfigError, ParityError
from sopdeploy.files import sha256
from sopdeploy_export.web.chromium import Report, find_chromium, run_check
from sopdeploy_export.web.examples import PIXEL_STEPS, CheckIndex, write_examples
from sopdeploy_export.web.runtime import fetch_runtime

_PAGE = Path(__file__).with_name("page")
_FIELDS = {"project", "inputs", "outputs", "preprocess", "decision", "stability"}  # of the manifest
# The unit of a step's difference, and what may help.
_STEPS = {
    "decode": ("gray levels", "name another release of the browser"),
    "resize": ("gray levels", "install Pillow from its wheel on PyPI"),
    "normalization": ("gray levels of the network's input", "report this as a bug"),
    "network": ("in a logit", "export in fp32, or on this machine"),
    "classes": ("in a probability, or by another class", "report this as a bug"),
    "all": ("of the spread of the logits", "report this as a bug"),
}


class Site(StrictModel):
    """The folder that was written: `images` were replayed in Chromium, `bytes` are those of the page.

    `ms_pixels` is the median time of decoding and resizing a golden example there, `ms_network` that of the
    network, in milliseconds.
    """

    path: Path
    bundle: str
    bytes: int
    images: int
    ms_pixels: float
    ms_network: float


def write_site(
    bundle: Bundle, out: Path, browser: str | None = None, on_step: Callable[[str], None] = lambda _: None
) -> Site:
    """Write *bundle* as a page to the new folder *out*, if its examples replay in Chromium (*browser*).

    Raises `BundleError` for a bundle that browsers cannot run, `RuntimeUnavailableError` without Chromium or
    onnxruntime-web, and `ParityError`, which names the first step that differs.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists; remove it or choose another folder", setting="out")
    program = find_chromium(browser)
    with staging(out.absolute().parent) as folder:
        on_step("writing files")
        index = fill_site(bundle, folder)
        on_step("replaying the examples in Chromium")
        report = run_check(folder, program)
        check_report(report, index)
        folder.chmod(0o755)
        folder.rename(out)
    pixels, network = (statistics.median(times) for times in zip(*report.ms, strict=True))
    size = sum(file.stat().st_size for file in out.iterdir() if file.is_file())
    return Site(
        path=out,
        bundle=bundle.name,
        bytes=size,
        images=len(index.examples),
        ms_pixels=pixels,
        ms_network=network,
    )


def fill_site(bundle: Bundle, folder: Path) -> CheckIndex:
    """Write all files of the page to *folder*, unchecked; return what a browser must reproduce."""
    manifest = bundle.manifest
    if manifest.precision not in {"fp32", "int8"}:
        raise BundleError(
            f"{bundle.path}: browsers do not run {manifest.precision}; export the checkpoint again",
            remedies={"precision": "fp32"},
        )
    fetch_runtime(folder)
    shutil.copytree(_PAGE, folder, dirs_exist_ok=True)
    shutil.copyfile(bundle.onnx, folder / bundle.onnx.name)
    fields = manifest.model_dump(mode="json", include=_FIELDS, exclude={"decision": {"reference"}})
    (folder / "site.json").write_bytes(to_json({"id": manifest.id, "labels": bundle.labels, **fields}))
    (folder / "check").mkdir()
    index = write_examples(bundle, folder / "check")
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    names += ["check/check.json", f"check/{index.examples[0].file}.input"]
    # A browser keeps these files, and fetches them again if the script differs.
    version = hashlib.sha256("".join(sha256(folder / name) for name in names).encode()).hexdigest()
    worker = folder / "worker.js"
    first = f"const [VERSION, FILES] = {json.dumps([version, ['./', *names]])};\n"
    worker.write_text(first + worker.read_text(encoding="utf-8"), encoding="utf-8")
    return index


def check_report(report: Report, index: CheckIndex) -> None:
    """Raise `ParityError` that names the first step outside of its bound, or without a result."""
    if report.error:
        raise ParityError(f"the page fails in this Chromium ({report.error}); name another release of it")
    found = {(row.example, row.step): row for row in report.rows}
    for step, bound in index.bounds.items():  # a wrong step also changes those after it
        for example in index.examples:
            row = found.get((example.file, step))
            if row is None and example.logits is None and step not in PIXEL_STEPS:
                continue
            if row is None or row.found is None or not row.found <= bound:
                unit, remedy = _STEPS[step]
                error = f" ({row.error})" if row is not None and row.error else ""
                wrong = "has another result" + error
                if row is not None and row.found is not None:
                    wrong = f"differs by {row.found:.3g} {unit}"
                raise ParityError(
                    f"{example.file}: the step `{step}` {wrong} in Chromium, the bound is {bound:.3g}; "
                    f"nothing was written: {remedy}"
                )
