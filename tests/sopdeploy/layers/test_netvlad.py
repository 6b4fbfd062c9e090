import torch

from sopdeploy.layers.pooling.codebook import NetVLAD


def test_it_is_the_sum_of_softly_assigned_residuals() -> None:
    torch.manual_seed(0)
    layer = NetVLAD(channels=3, words=4).double()
    maps = torch.randn(2, 3, 2, 5, dtype=torch.float64)
    share = layer.assign(maps).softmax(dim=1)
    residuals = torch.zeros(2, 4, 3, dtype=torch.float64)
    for row in range(2):
        for column in range(5):
            x = maps[:, :, row, column]
            residuals += share[:, :, row, column, None] * (x[:, None, :] - layer.centres[None])
    expected = (residuals / residuals.norm(dim=2, keepdim=True)).flatten(start_dim=1)
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer(maps), expected, rtol=0, atol=1e-12)


def test_gradients_match_differences() -> None:
    torch.manual_seed(0)
    layer = NetVLAD(channels=2, words=3).double()
    maps = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, maps)
