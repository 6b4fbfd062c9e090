"""Learning rate schedules, compared with PyTorch's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from sopdeploy.training.schedule import Cosine, Milestones, OneCycle, Polynomial


@pytest.mark.parametrize(
    ("time", "factor"),
    [(0, 0.0), (1, 0.5), (2, 1.0), (9.9, 1.0), (10, 0.1), (19.99, 0.1), (20, 0.01), (99, 0.01)],
)
def test_milestones_multiply_after_a_linear_warm_up(time, factor) -> None:
    schedule = Milestones(kind="milestones", milestones=(10, 20), gamma=0.1, warmup_epochs=2)
    assert schedule.factor(time, 100) == pytest.approx(factor)


def test_without_milestones_and_warm_up_the_rate_is_constant() -> None:
    assert {Milestones(kind="milestones").factor(time, 9) for time in (0, 0.5, 8.99)} == {1.0}


@pytest.mark.parametrize(
    ("schedule", "reference", "epochs", "steps", "tolerance"),
    [
        # PyTorch's peak is one step before 30 % of the run.
        (OneCycle(kind="one-cycle"), lambda o: lr_scheduler.OneCycleLR(o, 0.4, 101), 5, 20, 0.4 * 0.06),
        (Cosine(kind="cosine"), lambda o: lr_scheduler.CosineAnnealingLR(o, 20), 20, 1, 1e-9),
        (
            Cosine(kind="cosine", floor=0.1),
            lambda o: lr_scheduler.CosineAnnealingLR(o, 20, eta_min=0.04),
            20,
            1,
            1e-9,
        ),
        *(
            (
                Polynomial(kind="polynomial", power=power),
                lambda o, power=power: lr_scheduler.PolynomialLR(o, 20, power=power),
                20,
                1,
                1e-9,
            )
            for power in (0.5, 1.0, 2.0)
        ),
    ],
)
def test_schedules_equal_those_of_pytorch(schedule, reference, epochs, steps, tolerance) -> None:
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
def test_decaying_schedules_stay_between_0_and_1(time, warmup, floor, power) -> None:
    for schedule in (
        Cosine(kind="cosine", warmup_epochs=warmup, floor=floor),
        Polynomial(kind="polynomial", warmup_epochs=warmup, floor=floor, power=power),
    ):
        factor = schedule.factor(time * 10, 10)
        assert 0 <= factor <= 1 + 1e-12
        if time * 10 >= warmup:
            assert factor >= floor - 1e-12


def test_the_warm_up_is_linear() -> None:
    schedule = Cosine(kind="cosine", warmup_epochs=4)
    assert [schedule.factor(time, 10) for time in (0, 1, 2, 4)] == [0, 0.25, 0.5, 1]
