import pytest
import torch

from sopdeploy.errors import TrainingError
from sopdeploy.layers.mixture.components import FusionHead


def test_dropout_acts_in_training_only() -> None:
    head = FusionHead(64, 3, norm=False, dropout=0.5)
    x = torch.ones(2, 64)
    assert not torch.equal(head(x), head(x))
    head.eval()
    assert torch.equal(head(x), head.fc(x))


def test_a_training_batch_of_one_image_is_rejected() -> None:
    head = FusionHead(4, 2, norm=True, dropout=0.0)
    with pytest.raises(TrainingError, match="last, incomplete batch"):
        head(torch.randn(1, 4))
    assert head.eval()(torch.randn(1, 4)).shape == (1, 2)


def test_without_a_batch_norm_one_image_trains() -> None:
    assert FusionHead(4, 2, norm=False, dropout=0.0)(torch.randn(1, 4)).shape == (1, 2)
