import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sopdeploy.layers.distributed import Rows, RowsDropout
from sopdeploy.layers.mixture.gate import GateNoise


def in_shares(module, x, world: int) -> torch.Tensor:
    """Return what *world* processes compute, each its rows of *x* from the same seed."""
    outputs = []
    for rank in range(world):
        first, end = (len(x) * place // world for place in (rank, rank + 1))
        module.rows.start, module.rows.total = first, len(x)
        torch.manual_seed(7)
        outputs.append(module(x[first:end]))
    return torch.cat(outputs)


@settings(deadline=None, max_examples=40)
@given(samples=st.integers(1, 12), world=st.integers(1, 5), width=st.integers(1, 6))
def test_each_sample_is_given_the_same_numbers_by_any_number_of_processes(samples, world, width) -> None:
    x = torch.randn(samples, width, dtype=torch.float64)
    noises = [GateNoise(width, 3, per).double() for per in ("image", "component")]
    for module in [RowsDropout(0.5, Rows()), *noises]:
        torch.testing.assert_close(in_shares(module, x, world), in_shares(module, x, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_whole_batch_dropout_is_that_of_torch_bit_for_bit(dtype) -> None:
    x = torch.randn(4, 300, dtype=dtype)
    torch.manual_seed(3)
    expected = torch.nn.functional.dropout(x, 0.3)
    torch.manual_seed(3)
    assert torch.equal(RowsDropout(0.3, Rows())(x), expected)


def test_dropout_passes_everything_in_eval_mode_and_at_zero() -> None:
    x = torch.randn(3, 5)
    assert RowsDropout(0.9, Rows()).eval()(x) is x
    assert RowsDropout(0.0, Rows())(x) is x
