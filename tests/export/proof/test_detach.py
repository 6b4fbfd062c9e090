from collections.abc import Callable

import pytest
import torch

from sopdeploy.errors import DetachError
from sopdeploy.models.base import Classifier
from sopdeploy_export.detach import detach

Make = Callable[..., Classifier]


def test_detaching_removes_exactly_the_branches(make: Make) -> None:
    trained = make()
    lean = detach(trained)
    left = set(trained.state_dict()) - set(lean.state_dict())
    assert left == {name for name in trained.state_dict() if name.startswith("branches.")}
    assert set(lean.state_dict()) <= set(trained.state_dict())


def test_the_trained_network_stays_whole_and_shares_no_memory(make: Make) -> None:
    trained = make()
    lean = detach(trained)
    assert "branches.layer1_0.fc.weight" in trained.state_dict()
    lean.get_parameter("fc.weight").data.zero_()
    assert trained.get_parameter("fc.weight").abs().sum() > 0


def test_a_detached_network_is_in_eval_mode_and_can_go_on_learning_as_the_plain_one(make: Make) -> None:
    lean = detach(make().train())
    assert not any(part.training for part in lean.modules())
    logits = lean.train()(torch.rand(2, 3, 16, 16))
    assert isinstance(logits, torch.Tensor)


@pytest.mark.parametrize("name", ["resnet8", "resnet20"])
def test_a_network_without_training_only_parts_has_nothing_to_detach(make: Make, name: str) -> None:
    with pytest.raises(DetachError, match=r"nothing to detach.*without --detach"):
        detach(make(name))


def test_detaching_twice_is_told_plainly(make: Make) -> None:
    with pytest.raises(DetachError, match="no part named branches; it was detached before"):
        detach(detach(make()))


@pytest.mark.parametrize(
    ("wish", "message"), [("twigs", "no part named twigs"), ("layer9.twig", "it has no layer9")]
)
def test_a_training_only_name_that_does_not_exist_is_named(
    make: Make, monkeypatch: pytest.MonkeyPatch, wish: str, message: str
) -> None:
    trained = make()
    monkeypatch.setattr(type(trained), "training_only", (wish,))
    with pytest.raises(DetachError, match=message):
        detach(trained)
