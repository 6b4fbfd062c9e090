"""Configs, manifests and options are immutable, and have no fields that nothing reads."""

import pytest

from sopdeploy.images.preprocess import Preprocess

RULES = Preprocess(resize=36, crop=32)


def test_a_copy_with_changes_has_only_fields_of_its_model() -> None:
    assert RULES.model_copy(update={"crop": 24}) == Preprocess(resize=36, crop=24)
    assert RULES.model_copy() == RULES
    with pytest.raises(TypeError, match="Preprocess has no field crops, size"):
        RULES.model_copy(update={"size": 1, "crop": 24, "crops": 2})
