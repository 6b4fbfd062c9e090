"""Images with the results of every step that a browser must reproduce: golden examples, and three more.

The three have what golden examples lack: a rotation in EXIF, transparency, and the shape of a strip, in
another color space. Decoded and resized pixels are those of Pillow on this machine.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.golden import LOGIT_DRIFT, MAX_LEVELS, read_golden
from sopdeploy.bundle.manifest import to_json
from sopdeploy.decision import sigmoid, softmax
from sopdeploy.errors import BundleError
from sopdeploy.images.exif import ORIENTATION
from sopdeploy.images.pixels import MAX_ASPECT_RATIO, preprocess_image, to_rgb
from sopdeploy.images.preprocess import Preprocess

_QUARTER_TURN = 6  # EXIF orientation
_GAMMA = struct.pack(">I", 100_000)  # 1; browsers convert such colors unless told not to
_STRIP_WIDTH = 8


def write_examples(bundle: Bundle, folder: Path) -> int:
    """Write the examples of *bundle* to *folder*; return the number of steps to replay.

    `check.json` has the largest difference of each step, and the images: name, size and, of a golden example,
    logits and the answer to them. Beside an image, `.rgba` has its decoded pixels, `.rgb` the resized ones,
    and `.input` those that belong to the logits. Raises `BundleError` without golden examples.
    """
    golden, rules = read_golden(bundle), bundle.manifest.preprocess
    if not golden:
        raise BundleError(f"{bundle.path}: has no golden examples; export the checkpoint again")
    examples = []
    for image in golden:
        (folder / image.name).write_bytes(image.jpeg)
        (folder / f"{image.name}.input").write_bytes(image.pixels.tobytes())
        facts = {"logits": image.logits.tolist(), "answer": _answer(bundle, image.logits)}
        examples.append({**_write_pixels(folder / image.name, rules), **facts})
    examples += [_write_pixels(file, rules) for file in _draw_more(folder / golden[0].name)]
    of_all = {"decode": MAX_LEVELS, "resize": 0}
    of_golden = {"normalization": 0, "network": golden[0].tolerance, "classes": 1e-6, "all": LOGIT_DRIFT}
    bounds = {**of_all, **of_golden, "webgpu": golden[0].tolerance}
    (folder / "check.json").write_bytes(to_json({"bounds": bounds, "examples": examples}))
    return len(examples) * len(of_all) + len(golden) * len(of_golden)


def _write_pixels(file: Path, rules: Preprocess) -> dict[str, Any]:
    with Image.open(file) as image:
        decoded = to_rgb(image, rules)
        file.with_name(f"{file.name}.rgba").write_bytes(decoded.convert("RGBA").tobytes())
        file.with_name(f"{file.name}.rgb").write_bytes(preprocess_image(image, rules).tobytes())
    return {"file": file.name, "size": decoded.size}


def _draw_more(golden: Path) -> tuple[Path, ...]:
    exif, gamma = Image.Exif(), PngImagePlugin.PngInfo()
    exif[ORIENTATION] = _QUARTER_TURN
    gamma.add(b"gAMA", _GAMMA)
    rotated, transparent, strip = (golden.with_name(name) for name in ("turn.jpg", "alpha.png", "strip.png"))
    with Image.open(golden) as image:
        image.save(rotated, quality=90, exif=exif)
        image.resize((_STRIP_WIDTH, (MAX_ASPECT_RATIO + 1) * _STRIP_WIDTH)).save(strip, pnginfo=gamma)
        image.putalpha(image.convert("L"))
        image.save(transparent)
    return rotated, transparent, strip


def _answer(bundle: Bundle, logits: NDArray[np.float32]) -> dict[str, Any]:
    """Compute all classes, best first, `known`, `score` and `stable` of an image with *logits* (C,)."""
    manifest = bundle.manifest
    thresholds, rejection, stability = manifest.thresholds, manifest.rejection, manifest.stability
    shares = (softmax(logits) if thresholds is None else sigmoid(logits)).tolist()
    order = [
        index
        for index in np.argsort(-logits, kind="stable").tolist()
        if thresholds is None or shares[index] >= thresholds[index]
    ]
    known, score = (None, None) if rejection is None else rejection.recognize(logits)
    classes = [{"label": bundle.labels[index], "probability": shares[index]} for index in order]
    stable = None if stability is None else stability.is_stable(logits)
    return {"classes": classes, "known": known, "score": score, "stable": stable}
