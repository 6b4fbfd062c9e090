"""The simulation equals a closed form; no image is lost, and no runtime is idle while images wait."""

import itertools
from typing import Any

import pytest
from capacity_model import System
from capacity_simulation import Batch, Route, Simulation
from hypothesis import given, settings
from hypothesis import strategies as st

ROUTES = st.sampled_from(["random", "round-robin", "least-loaded"])
SYSTEMS = st.builds(
    System,
    fixed_ms=st.floats(0, 30),
    each_ms=st.floats(0.1, 10),
    largest=st.integers(1, 16),
    decode_ms=st.floats(0, 8),
    loop_ms=st.floats(0, 1),
    decoders=st.integers(1, 4),
)


def by_replica(batches: list[Batch]) -> list[list[Batch]]:
    ordered = sorted(batches, key=lambda batch: (batch.replica, batch.start))
    return [list(group) for _, group in itertools.groupby(ordered, key=lambda batch: batch.replica)]


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_the_wait_of_one_server_equals_the_closed_form_of_m_d_1(load: float) -> None:
    system = System(fixed_ms=10.0, each_ms=0.0, largest=1, decode_ms=0.0, loop_ms=0.0, decoders=1)
    outcome = Simulation(system, held=10_000).poisson(100 * load, 60_000)
    found = outcome.measured(1000.0)
    assert found.mean_ms - 10 == pytest.approx(10 * load / (2 * (1 - load)), rel=0.05)


@given(
    system=SYSTEMS,
    route=ROUTES,
    replicas=st.integers(1, 4),
    held=st.integers(1, 40),
    load=st.floats(0.1, 3.0),
    lose=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_image_is_answered_rejected_or_lost_once(
    system: System, route: Route, replicas: int, held: int, load: float, lose: bool
) -> None:
    play = Simulation(system, replicas=replicas, route=route, held=held)
    lose_at = 200.0 if lose and replicas > 1 else None
    outcome = play.poisson(load * replicas * system.capacity, 300, lose_at)
    assert outcome.sent == 300
    assert outcome.sent == len(outcome.answered) + outcome.refused + outcome.lost
    assert lose_at is not None or outcome.lost == 0
    assert outcome.lost <= held
    alone = system.loop_ms + system.decode_ms + system.batch_ms(1)
    assert all(gone - came >= alone - 1e-6 for came, gone in outcome.answered)


@given(system=SYSTEMS, route=ROUTES, replicas=st.integers(1, 3), load=st.floats(0.1, 2.0))
@settings(max_examples=60, deadline=None)
def test_no_runtime_is_idle_while_an_image_waits(
    system: System, route: Route, replicas: int, load: float
) -> None:
    outcome = Simulation(system, replicas=replicas, route=route).poisson(load * replicas * 100, 300)
    for batches in by_replica(outcome.batches):
        free = 0.0
        for batch in batches:
            assert batch.start == max(free, batch.oldest)
            assert batch.images == system.largest or batch.left == 0
            assert 1 <= batch.images <= system.largest
            free = batch.end


@given(system=SYSTEMS, clients=st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_closed_loop_clients_are_never_rejected_while_there_is_room(system: System, clients: int) -> None:
    outcome = Simulation(system, held=clients).closed_loop(clients, 200)
    assert (outcome.refused, len(outcome.answered)) == (0, 200)


def test_a_rejected_closed_loop_client_retries() -> None:
    system = System(fixed_ms=50.0, each_ms=0.0, largest=1, decode_ms=0.0, loop_ms=0.0, decoders=1)
    outcome = Simulation(system, held=1).closed_loop(2, 40)
    assert outcome.refused == 2  # the second client at once, and a second later
    assert len(outcome.answered) == 38


def test_a_lost_replica_loses_its_images_and_receives_no_more() -> None:
    system = System(fixed_ms=20.0, each_ms=2.0, largest=8, decode_ms=3.0, loop_ms=0.5, decoders=2)
    outcome = Simulation(system, replicas=3, route="round-robin").poisson(300.0, 2000, lose_at=1000.0)
    assert 0 < outcome.lost < 40
    assert max(batch.start for batch in outcome.batches if batch.replica == 0) <= 1000.0
    assert {batch.replica for batch in outcome.batches if batch.start > 1200.0} == {1, 2}


def test_a_run_depends_on_its_seed_only() -> None:
    system = System(fixed_ms=20.0, each_ms=2.0, largest=8, decode_ms=3.0, loop_ms=0.5, decoders=2)

    def run(seed: int) -> list[Any]:
        return Simulation(system, replicas=2, seed=seed).poisson(200.0, 400).answered

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_enough_closed_loop_clients_give_full_batches_at_the_capacity() -> None:
    system = System(fixed_ms=20.0, each_ms=10.0, largest=8, decode_ms=2.6, loop_ms=0.46, decoders=2)
    found = Simulation(system, held=64).closed_loop(32, 4000).measured(2000.0)
    assert found.images_per_s == pytest.approx(80.0, rel=0.01)
    assert found.batch == pytest.approx(8.0, rel=0.01)
    assert found.p50_ms == pytest.approx(400.0, rel=0.01)
