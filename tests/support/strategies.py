"""Hypothesis strategies that tests share: image files, JSON bodies and other bytes, mostly damaged."""

from typing import Any

import numpy as np
import orjson
from hypothesis import strategies as st
from PIL import Image

from sopdeploy.images.limits import FORMATS
from tests.support.pictures import encoded

NOISE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (24, 31, 3), dtype=np.uint8))
OPTIONS: dict[str, dict[str, Any]] = {
    "GIF": {"save_all": True, "append_images": [NOISE.rotate(90)], "loop": 0},
    "PNG": {"transparency": 0},
}
FILES = {
    kind: encoded(NOISE.convert("P") if kind == "PNG" else NOISE, kind, **OPTIONS.get(kind, {}))
    for kind in FORMATS.values()
}
MAGICS = [*(body[:12] for body in FILES.values()), b"GIF87a", b"BM", b"RIFF....WEBP", b"%!PS"]
TOKENS = [*'[]{},:"-.e01', "", "true", "null"]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def damaged(
    *bodies: bytes, pieces: st.SearchStrategy[bytes] | None = None, most: int = 6
) -> st.SearchStrategy[bytes]:
    """One of *bodies*, in which up to *most* parts are replaced by *pieces*, and which may be cut."""
    pieces = st.binary(max_size=4) if pieces is None else pieces
    edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), pieces), max_size=most)

    def change(body: bytes, edits: list[tuple[float, int, bytes]], kept: float) -> bytes:
        for place, length, piece in edits:
            start = int(place * len(body))
            body = body[:start] + piece + body[start + length :]
        return body[: int(kept * len(body))]

    return st.builds(change, st.sampled_from(bodies), edits, st.just(1.0) | st.floats(0.05, 1))


image_files = damaged(*FILES.values()) | st.builds(
    bytes.__add__, st.sampled_from(MAGICS), st.binary(max_size=300)
)


def json_bodies(valid: object) -> st.SearchStrategy[bytes]:
    """The JSON of *valid*, mostly damaged."""
    tokens = st.sampled_from([token.encode() for token in TOKENS])
    return damaged(orjson.dumps(valid), pieces=tokens, most=3)
