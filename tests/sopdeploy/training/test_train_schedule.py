import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


def test_one_cycle_is_pytorchs() -> None:
    steps, epochs = 20, 5
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=steps * epochs + 1)
    ours = OneCycle(kind="one-cycle")
    for step in range(steps * epochs):
        expected = 0.4 * ours.factor(step / steps, epochs)
        # PyTorch's peak lies one step before 30 % of the run.
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, abs=0.4 * 0.06)
        optimizer.step()
        theirs.step()


@given(time=st.floats(0, 1), rise=st.floats(0.01, 0.99))
def test_one_cycle_stays_between_nearly_0_and_1(time, rise) -> None:
    assert 0 < OneCycle(kind="one-cycle", rise=rise).factor(time * 7, 7) <= 1


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_cosine_is_pytorchs(floor) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.4 * floor)
    for epoch in range(20):
        ours = 0.4 * Cosine(kind="cosine", floor=floor).factor(epoch, 20)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_polynomial_is_pytorchs(power) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    theirs = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=20, power=power)
    for epoch in range(21):
        ours = 0.4 * Polynomial(kind="polynomial", power=power).factor(epoch, 20)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        theirs.step()


@given(time=st.floats(0, 1), warmup=st.floats(0, 12), floor=st.floats(0, 1), power=st.floats(0.1, 4))
def test_falling_schedules_stay_between_0_and_1_whatever_the_warm_up(time, warmup, floor, power) -> None:
    for schedule in (
        Cosine(kind="cosine", warmup_epochs=warmup, floor=floor),
        Polynomial(kind="polynomial", warmup_epochs=warmup, floor=floor, power=power),
    ):
        factor = schedule.factor(time * 10, 10)
        assert 0 <= factor <= 1 + 1e-12
        if time * 10 >= warmup:
            assert factor >= floor - 1e-12


def test_a_warm_up_rises_in_a_straight_line() -> None:
    schedule = Cosine(kind="cosine", warmup_epochs=4)
    assert [schedule.factor(time, 10) for time in (0, 1, 2, 4)] == [0, 0.25, 0.5, 1]
