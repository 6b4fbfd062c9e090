"""Faults that a page in a browser could have: each is planted into a written page, and must be refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from sopdeploy_export.web.chromium import PageReport
from sopdeploy_export.web.site import fill_site
from tests.web.conftest import KNOWN, tiny

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("linked_runtime")]

Change = Callable[[bytes], bytes]


def text(old: str, new: str) -> Change:
    def change(content: bytes) -> bytes:
        assert old.encode() in content
        return content.replace(old.encode(), new.encode())

    return change


def weights(change: Callable[[np.ndarray], np.ndarray]) -> Change:
    def apply(content: bytes) -> bytes:
        model = onnx.load_from_string(content)
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "weights")
        tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), "weights"))
        return model.SerializeToString()

    return apply


NONE = '{ colorSpaceConversion: "none" }'
NO_EXIF = (
    "new Blob([new Uint8Array(await source.arrayBuffer()).map("
    "(byte, i) => (i < 40 && byte === 0x45 ? 0 : byte))])"  # the E of Exif
)
ABROAD = 'await fetch("http://127.0.0.2:1/");'
LABELS = '"labels": [\n    '
RGB = "data.subarray(start, start + 3)"
# By step: name, change of `browser.mjs`, `classify.mjs`, `site.json` or `model.onnx`.
DECODE: dict[str, Change] = {
    "EXIF ignored": text("createImageBitmap(source,", f"createImageBitmap({NO_EXIF},"),
    "transparency ignored": text("context.fillRect(0, 0, width, height);", ""),
    "colors converted": text(NONE, "{}"),
    "decoded smaller": text(NONE, '{ colorSpaceConversion: "none", resizeWidth: 20 }'),
}
RESIZE: dict[str, Change] = {
    "BGR": text(RGB, f"{RGB}.slice().reverse()"),
    "no antialiasing": text("Math.max(1, scale)", "1"),
    "half a pixel off": text("(position + 0.5) * scale", "position * scale"),
    "rounded down": text("let sum = 1 << (BITS - 1)", "let sum = 0"),
    "overshoot wraps": text("new Uint8ClampedArray", "new Uint8Array"),
    "always columns first": text("if (removed > 0 &&", "if (false &&"),
    "strips resized whole": text("MAX_ASPECT_RATIO = 16", "MAX_ASPECT_RATIO = 99"),
    "crop offset": text("nearest((side - crop) / 2)", "nearest((side - crop) / 2) + 1"),
    "transposed": text("3 * (y * crop + x)", "3 * (x * crop + y)"),
}
RULES: dict[str, Change] = {
    "padded": text('"fit": "crop"', '"fit": "pad"'),
    "squashed": text('"fit": "crop"', '"fit": "squash"'),
    "bilinear": text('"bicubic"', '"bilinear"'),
    "wrong size": text('"resize": 61', '"resize": 62'),
}
INPUT: dict[str, Change] = {
    "normalized twice": text(
        "Uint8Array.from(pixels)", "Uint8Array.from(pixels, (v) => (v / 255 - 0.45) / 0.2)"
    ),
    "float32": text('["uint8", Uint8Array', '["float32", Float32Array'),
    "channels first": text("[1, crop, crop, 3]]", "[1, 3, crop, crop]]"),
}
NETWORK: dict[str, Change] = {
    "not normalized": weights(lambda w: w * 255),
    "float16": weights(lambda w: w.astype(np.float16).astype(np.float32)),
    "wrong weights": weights(lambda w: w[:, ::-1].copy()),
}
ANSWER: dict[str, Change] = {
    "temperature": text("logits[index] - energy)", "2 * (logits[index] - energy))"),
    "known inverted": text("score >= rejection", "score <= rejection"),
    "stable inverted": text("[order[1]] > threshold", "[order[1]] < threshold"),
}
FAULTS: dict[str, tuple[str, Change, str]] = {
    **{name: ("browser.mjs", change, "`decode`") for name, change in DECODE.items()},
    **{name: ("classify.mjs", change, "`resize`") for name, change in RESIZE.items()},
    **{name: ("site.json", change, "`resize`") for name, change in RULES.items()},
    **{name: ("classify.mjs", change, "`normalization`") for name, change in INPUT.items()},
    **{name: ("model.onnx", change, "`network`") for name, change in NETWORK.items()},
    **{name: ("classify.mjs", change, "`classes`") for name, change in ANSWER.items()},
    "labels shifted": ("site.json", text(f'{LABELS}"ant"', f'{LABELS}"gnu",\n"ant"'), "`classes`"),
    "file not decoded": (
        "browser.mjs",
        text("await network(pixels)", "await network(pixels.fill(9))"),
        "`all`",
    ),
    "damaged network": ("model.onnx", lambda content: content[:-9], "the page fails"),
    "another host": (
        "browser.mjs",
        text("const [site, ort]", f"{ABROAD} const [site, ort]"),
        "the page fails",
    ),
}
BY_DEFAULT = {"no antialiasing", "float16", "labels shifted"}


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.slow) for name in FAULTS]
)
def test_a_page_with_a_fault_is_refused(
    fault: str, tmp_path: Path, replay: Callable[[Path], PageReport]
) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    fill_site(tiny(tmp_path / "bundles", rejection=KNOWN), folder)
    name, change, expected = FAULTS[fault]
    file = folder / name
    file.write_bytes(change(file.read_bytes()))
    assert expected in replay(folder).failure
