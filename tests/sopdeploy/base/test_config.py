"""Configs, manifests and options are immutable, and have no fields that nothing reads; JSON has numbers."""

import pytest

from sopdeploy.base.config import OtherVersionError, check_format, parse_json
from sopdeploy.images.preprocess import Preprocess

RULES = Preprocess(resize=36, crop=32)


def test_a_copy_with_changes_has_only_fields_of_its_model() -> None:
    assert RULES.model_copy(update={"crop": 24}) == Preprocess(resize=36, crop=24)
    assert RULES.model_copy() == RULES
    with pytest.raises(TypeError, match="crops, size"):
        RULES.model_copy(update={"size": 1, "crop": 24, "crops": 2})


@pytest.mark.parametrize(
    "number", ["1e999", "-1E+400", "1e0999", "9" * 400 + ".0", "1" + "0" * 210 + "e99"]
)
def test_a_number_of_json_that_no_float_has_is_refused_everywhere(number: str) -> None:
    for document in (number, f"[0, {number}]", f'{{"a": {{"b": {number}}}}}'):
        with pytest.raises(ValueError, match="not JSON: "):
            parse_json(document)


def test_large_numbers_and_texts_like_them_are_read() -> None:
    document = '{"a": [1.5e308, 1e-999, 3e-100], "b": "1e999", "c": "%s"}' % ("9" * 400)
    assert parse_json(document) == {"a": [1.5e308, 0.0, 3e-100], "b": "1e999", "c": "9" * 400}


@pytest.mark.parametrize(
    ("version", "written_by", "unknown"),
    [("x" * 10_000, "0.9", ()), (2, "x" * 10_000, ()), (1, "0.9", ("x" * 10_000,))],
)
def test_a_file_of_another_version_is_named_in_a_short_message(
    version: object, written_by: str, unknown: tuple[str, ...]
) -> None:
    with pytest.raises(OtherVersionError) as caught:
        check_format(version, 1, written_by, unknown)
    assert len(str(caught.value)) < 300
