import pytest
import torch
from torch import nn

from sopdeploy.errors import TrainingError
from sopdeploy.layers.mixture.components import FusionHead


def trained_head() -> FusionHead:
    torch.manual_seed(0)
    head = FusionHead(12, 5, norm=True, dropout=0.2).double()
    assert isinstance(head.bn, nn.BatchNorm1d)
    nn.init.normal_(head.bn.weight)
    nn.init.normal_(head.bn.bias)
    for _ in range(3):
        head(torch.randn(8, 12, dtype=torch.float64))
    return head


def test_the_batch_norm_folds_into_the_linear_layer_through_dropout() -> None:
    head = trained_head().eval()
    bn, x = head.bn, torch.randn(4, 12, dtype=torch.float64)
    assert isinstance(bn, nn.BatchNorm1d)
    assert bn.running_var is not None
    assert bn.running_mean is not None
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    offset = bn.bias - bn.running_mean * scale
    folded = x @ (head.fc.weight * scale).T + head.fc.bias + head.fc.weight @ offset
    torch.testing.assert_close(head(x), folded, rtol=0, atol=1e-12)


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
