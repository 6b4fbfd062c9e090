"""Which operators differ from ATen on unusual values, and that each is compared once."""

from collections.abc import Callable

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sopdeploy.errors import LoweringError
from sopdeploy.images.preprocess import Preprocess
from tests.operators import compare
from tests.operators.compare import check_function as check
from tests.operators.programs import EQUAL

PREPROCESS = Preprocess(resize=16, crop=16)
CAN_BE_NAN = "its operand can be NaN"
SORTED = r"because equal values have no defined order; use torch\.sort\(stable=True\)"


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a divisor": (
        lambda x: F.avg_pool2d(x, 2, divisor_override=3).mean((2, 3)),
        r"avg_pool2d.* instead of",
    ),
    "strides": (
        lambda x: torch.as_strided(x.to(memory_format=torch.channels_last), (1, 3), (768, 1)),
        r"as_strided.* instead of",
    ),
    "ties of topk": (lambda x: x.flatten(1).topk(5)[1].float(), rf"topk.*{SORTED}"),
    "ties of argsort": (
        lambda x: x.flatten(1).argsort(1)[:, :5].float(),
        rf"argsort.*{SORTED}",
    ),
    "maximum of NaN": (
        lambda x: (x / x.sum((2, 3), True)).amax((2, 3)),
        rf"amax.* instead of nan; {CAN_BE_NAN}",
    ),
    "position of NaN": (
        lambda x: (x / x.std()).flatten(1).argmax(1, True).float(),
        rf"argmax.* instead of \d+; {CAN_BE_NAN}",
    ),
    "max pooling of NaN": (
        lambda x: F.max_pool2d(x / x.mean(), 4).mean((2, 3)),
        rf"max_pool2d.* instead of nan; {CAN_BE_NAN}",
    ),
    "casts of large values": (
        lambda x: (x * 1e9).long().to(torch.int32).float().mean((2, 3)),
        r"_to_copy.default and aten\._to_copy.* instead of -1.29497e\+09 for 3e\+09",
    ),
    "the largest values": (
        lambda x: torch.remainder(x, 1 + x * x).mean((2, 3)),
        r"remainder.* -inf instead of \S+ for 3.40282e\+38, ",
    ),
    "a sum with a factor": (
        lambda x: x.add(x, alpha=2).mean((2, 3)),
        r"add.* nan instead of -inf",
    ),
    "a transposed matrix times a vector": (
        lambda x: x.flatten(2).transpose(1, 2) @ torch.ones(3),
        r"transpose.int and aten\.matmul.* instead of",
    ),
    "overflow": (
        lambda x: torch.logaddexp(x, 2 * x).mean((2, 3)),
        r"logaddexp.* inf instead of 100 for 100",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_operator_whose_onnx_form_differs_is_named_with_its_part(case: str) -> None:
    function, message = REFUSED[case]
    with pytest.raises(
        LoweringError,
        match=rf"aten\.{message.split('.*')[0]}\S* in 1: .*{message.split('.*')[1]}",
    ):
        check(function, PREPROCESS)


def test_a_finite_result_in_place_of_infinity_is_refused(monkeypatch) -> None:
    session, run = ort.InferenceSession, ort.InferenceSession.run
    monkeypatch.setattr(
        session, "run", lambda *given: [np.where(np.isposinf(x), 9, x) for x in run(*given)]
    )
    with pytest.raises(LoweringError, match=r"9 instead of inf"):
        check(lambda x: torch.sinh(x).mean((2, 3)), PREPROCESS)


@pytest.mark.parametrize("case", EQUAL)
def test_equal_operators_are_accepted_and_compared_once(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(lambda x: EQUAL[case](x).flatten(1), PREPROCESS)
    monkeypatch.setattr(
        compare, "_compare_group", lambda calls: pytest.fail("again") if calls else []
    )
    check(lambda x: EQUAL[case](x).flatten(1), PREPROCESS)
