"""The manifest has exactly one serialization, and everything else is rejected."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sopdeploy.bundle.manifest import ID_LENGTH, BatchRange, FileRecord, Manifest, to_json
from tests.forged import FIELDS

FUZZ = settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
FILES = {"model.onnx": FileRecord(bytes=3, sha256="a" * 64)}
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | FLOATS | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


def manifest(**fields: Any) -> Manifest:
    return Manifest(**{**FIELDS, "files": FILES, **fields})


@FUZZ
@given(
    model=st.from_regex(r"(head:)?(timm:)?[A-Za-z0-9._-]+", fullmatch=True),
    config=st.dictionaries(NAMES, VALUES, max_size=4),
    detached=st.lists(NAMES, max_size=3),
)
def test_a_manifest_is_read_as_it_was_written(
    model: str, config: dict[str, Any], detached: list[str]
) -> None:
    written = manifest(model=model, config=config, detached=tuple(detached))
    assert Manifest.from_bytes(written.to_bytes()) == written


def test_the_id_is_first_and_depends_on_the_other_fields() -> None:
    one = manifest()
    assert (one.to_bytes(), one.image_shape) == (manifest().to_bytes(), (16, 16, 3))
    assert list(json.loads(one.to_bytes()))[:4] == ["id", "sha256", "format", "version"]
    assert json.loads(one.to_bytes())["id"] == one.id
    assert len(one.id) == ID_LENGTH
    others = [
        manifest(model="other"),
        manifest(project="other"),
        manifest(opset=19),
        manifest(config={"width": 5}),
        manifest(files={"model.onnx": FileRecord(bytes=3, sha256="b" * 64)}),
        manifest(batch=BatchRange(maximum=65)),
    ]
    assert len({one.id, *(other.id for other in others)}) == 7


def test_the_time_of_the_export_is_not_part_of_the_id() -> None:
    later = manifest(exported_at="2027-01-02T03:04:05.000000Z")
    assert (later.id, later.to_bytes() == manifest().to_bytes()) == (manifest().id, False)
    for time in ("", "2026-01-02", "2026-01-02T03:04:05.000000+01:00", "2026-01-02T03:04:05Z"):
        with pytest.raises(ValueError, match="exported_at"):
            manifest(exported_at=time)


def edited(**changes: Any) -> bytes:
    return to_json({**json.loads(manifest().to_bytes()), **changes})


def lineage(**changes: Any) -> bytes:
    return edited(lineage={**json.loads(manifest().to_bytes())["lineage"], **changes})


VALID = manifest().to_bytes()
REFUSED: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{]", "Expecting"),
    "a list": (b"[]\n", "not a JSON object"),
    "an unknown key": (edited(extra=1), "extra: unknown key"),
    "a newer version": (edited(version=2), r"version: .*\(got '2'\)"),
    "another format": (edited(format="zip"), "format: .*zip"),
    "an invalid hash": (lineage(onnx_root="xyz"), r"lineage\.onnx_root"),
    "a negative size": (edited(files={"a": {"bytes": -1, "sha256": "a" * 64}}), r"files\.a\.bytes"),
    "batches out of order": (edited(batch={"minimum": 9, "optimum": 8}), "minimum <= optimum"),
    "another id": (edited(id="0" * 12), "was edited or damaged"),
    "no id": (to_json({k: v for k, v in json.loads(VALID).items() if k != "id"}), "was edited or damaged"),
    "a duplicate key": (VALID.replace(b'  "opset": 18', b'  "opset": 17,\n  "opset": 18'), "was edited"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_bytes_are_rejected(case: str) -> None:
    raw, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        Manifest.from_bytes(raw)
