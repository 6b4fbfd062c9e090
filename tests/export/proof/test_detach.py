from collections.abc import Callable

import pytest
import torch

from sopdeploy.errors import DetachError
from sopdeploy.models.base import Classifier
from sopdeploy_export.pipeline import detach

Make = Callable[..., Classifier]


def test_detach_removes_exactly_the_branches_and_shares_no_memory(make: Make) -> None:
    trained = make()
    names = set(trained.state_dict())
    lean = detach(trained)
    assert names - set(lean.state_dict()) == {name for name in names if name.startswith("branches.")}
    assert set(lean.state_dict()) <= names
    assert set(trained.state_dict()) == names
    lean.get_parameter("fc.weight").data.zero_()
    assert trained.get_parameter("fc.weight").abs().sum() > 0


def test_detached_network_is_in_eval_mode_and_can_be_trained_as_the_plain_one(make: Make) -> None:
    lean = detach(make().train())
    assert not any(part.training for part in lean.modules())
    logits = lean.train()(torch.rand(2, 3, 16, 16))
    assert isinstance(logits, torch.Tensor)


@pytest.mark.parametrize("name", ["resnet8", "resnet20"])
def test_network_without_training_only_parts_has_nothing_to_detach(make: Make, name: str) -> None:
    with pytest.raises(DetachError, match=r"nothing to detach.*without --detach"):
        detach(make(name))


def test_second_detach_is_rejected(make: Make) -> None:
    with pytest.raises(DetachError, match="no part named branches; it is already detached"):
        detach(detach(make()))


@pytest.mark.parametrize(
    ("name", "message"), [("twigs", "no part named twigs"), ("layer9.twig", "it has no layer9")]
)
def test_unknown_training_only_name_is_rejected(
    make: Make, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    trained = make()
    monkeypatch.setattr(type(trained), "training_only", (name,))
    with pytest.raises(DetachError, match=message):
        detach(trained)
