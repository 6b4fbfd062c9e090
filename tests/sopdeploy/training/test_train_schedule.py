"""Learning rate schedules, compared with PyTorch's."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from sopdeploy.training.schedule import Cosine, Milestones, OneCycle, Polynomial


def test_milestones_multiply_after_a_linear_warm_up() -> None:
    schedule = Milestones(kind="milestones", milestones=(10, 20), gamma=0.1, warmup_epochs=2)
    factors = {0: 0.0, 1: 0.5, 2: 1.0, 9.9: 1.0, 10: 0.1, 19.99: 0.1, 20: 0.01, 99: 0.01}
    assert {time: schedule.factor(time, 100) for time in factors} == pytest.approx(factors)
    assert {Milestones(kind="milestones").factor(time, 9) for time in (0, 0.5, 8.99)} == {1.0}


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        (OneCycle(kind="one-cycle"), partial(lr_scheduler.OneCycleLR, max_lr=0.4, total_steps=101)),
        (Cosine(kind="cosine"), partial(lr_scheduler.CosineAnnealingLR, T_max=20)),
        (Cosine(kind="cosine", floor=0.1), partial(lr_scheduler.CosineAnnealingLR, T_max=20, eta_min=0.04)),
        *(
            (
                Polynomial(kind="polynomial", power=power),
                partial(lr_scheduler.PolynomialLR, total_iters=20, power=power),
            )
            for power in (0.5, 1.0, 2.0)
        ),
    ],
)
def test_schedules_equal_those_of_pytorch(schedule, reference) -> None:
    epochs, steps, tolerance = 20, 1, 1e-9
    if schedule.kind == "one-cycle":  # PyTorch's peak is one step before 30 % of the run
        epochs, steps, tolerance = 5, 20, 0.4 * 0.06
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    theirs = reference(optimizer)
    for step in range(epochs * steps):
        expected = optimizer.param_groups[0]["lr"]
        assert 0.4 * schedule.factor(step / steps, epochs) == pytest.approx(expected, abs=tolerance)
        optimizer.step()
        theirs.step()


@given(time=st.floats(0, 1), rise=st.floats(0.01, 0.99))
def test_one_cycle_stays_between_0_and_1(time, rise) -> None:
    assert 0 < OneCycle(kind="one-cycle", rise=rise).factor(time * 7, 7) <= 1


@given(time=st.floats(0, 1), warmup=st.floats(0, 12), floor=st.floats(0, 1), power=st.floats(0.1, 4))
def test_decaying_schedules_stay_between_0_and_1_after_a_linear_warm_up(time, warmup, floor, power) -> None:
    for schedule in (
        Cosine(kind="cosine", warmup_epochs=warmup, floor=floor),
        Polynomial(kind="polynomial", warmup_epochs=warmup, floor=floor, power=power),
    ):
        factor = schedule.factor(time * 10, 10)
        assert 0 <= factor <= 1 + 1e-12
        if time * 10 >= warmup:
            assert factor >= floor - 1e-12
    schedule = Cosine(kind="cosine", warmup_epochs=4)
    assert [schedule.factor(time, 10) for time in (0, 1, 2, 4)] == [0, 0.25, 0.5, 1]
