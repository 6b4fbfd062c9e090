"""What is compared with what, and when an alarm begins and ends: blocks are numbers here."""

from collections.abc import Sequence

import pytest

from sopdeploy.evaluation.drift import Comparison
from sopdeploy.evaluation.watch import (
    END_BLOCKS,
    FIRST_BLOCKS,
    NEWEST_BLOCKS,
    NUM_BLOCKS,
    UNSURE,
    Comparisons,
    News,
    Watch,
)

USUAL, CHANGED, MENDED = 0, 1, 2  # a mended block looks changed, but is as sure as a usual one


def compare(reference: Sequence[int], window: Sequence[int]) -> Comparisons:
    """An alarm if most of *window* are blocks that the reference has not."""

    def judge(kinds: set[int]) -> Comparison:
        share = sum(block in kinds and block not in reference for block in window) / len(window)
        return Comparison(share, 0.0 if share > 0.5 else 1.0, rises=False)

    return {"image": judge({CHANGED, MENDED}), "confidence": judge({CHANGED})}


def send(watch: Watch[int], block: int, count: int) -> list[tuple[int, News]]:
    """Add *count* blocks; return the news, each with the number of blocks before it."""
    told: list[tuple[int, News]] = []
    for number in range(1, count + 1):
        if watch.add(block):
            _, news = watch.test(compare)
            if news is not None:
                told.append((number, news))
    return told


@pytest.fixture
def watch() -> Watch[int]:
    watched = Watch[int]()
    assert send(watched, USUAL, 3 * NUM_BLOCKS) == []
    return watched


def test_the_first_comparison_comes_when_it_was_announced() -> None:
    watch = Watch[int]()
    needed = watch.num_needed
    assert needed == 2 * NEWEST_BLOCKS
    assert [watch.add(USUAL) for _ in range(needed)].index(True) == needed - 1


def test_the_first_reference_grows_behind_the_newest_blocks() -> None:
    watch = Watch[int]()
    sizes = []
    for _ in range(FIRST_BLOCKS + NEWEST_BLOCKS + 2):
        if watch.add(USUAL):
            watch.test(compare)
            sizes.append((len(watch.reference), len(watch.window)))
    assert sizes == [(4, 4), (6, 4), (8, 4), (10, 4), (12, 4), (12, 6)]


def test_the_last_full_window_without_an_alarm_is_the_reference(watch) -> None:
    assert len(watch.reference) == NUM_BLOCKS


@pytest.mark.parametrize(("p_value", "kind"), [(UNSURE, USUAL), (2 * UNSURE, CHANGED)])
def test_a_window_that_may_differ_is_no_reference(watch, p_value, kind) -> None:
    """So a change that is not significant yet does not become usual."""
    unclear = {"image": Comparison(1.0, p_value)}
    for _ in range(2 * NUM_BLOCKS):
        if watch.add(CHANGED):
            _, news = watch.test(lambda *_parts: unclear)
            assert news is None
    assert set(watch.reference) == {kind}


def test_an_alarm_begins_within_the_newest_blocks_and_goes_on_while_the_change_stays(
    watch,
) -> None:
    [(blocks, news)] = send(watch, CHANGED, 2 * NUM_BLOCKS)
    assert news == "begins"
    assert blocks <= NEWEST_BLOCKS
    assert set(watch.reference) == {USUAL}


def test_an_alarm_ends_when_the_change_has_gone(watch) -> None:
    send(watch, CHANGED, 2 * END_BLOCKS)
    told = send(watch, USUAL, 2 * END_BLOCKS)
    assert [news for _, news in told] == ["ends"]


def test_a_bundle_that_mends_nothing_leaves_the_alarm_and_the_reference(watch) -> None:
    send(watch, CHANGED, END_BLOCKS)
    watch.replace(watch.reference)
    assert [news for _, news in send(watch, CHANGED, 2 * NUM_BLOCKS)] == ["goes on"]
    assert set(watch.reference) == {USUAL}


def test_a_bundle_that_has_learned_the_change_ends_the_alarm_for_good(watch) -> None:
    send(watch, CHANGED, END_BLOCKS)
    watch.replace(watch.reference)
    assert [news for _, news in send(watch, MENDED, 2 * NUM_BLOCKS)] == ["ends"]
    assert set(watch.reference) == {MENDED}


def test_an_alarm_ends_if_too_little_of_its_reference_is_left() -> None:
    watch = Watch([USUAL] * NEWEST_BLOCKS, alarm_blocks=NEWEST_BLOCKS, is_replaced=True)
    watch.replace(watch.reference[1:])
    assert send(watch, USUAL, NUM_BLOCKS) == []
    assert not watch.is_alarm
    assert len(watch.reference) == FIRST_BLOCKS


def test_a_bundle_that_comes_without_an_alarm_begins_none(watch) -> None:
    watch.replace(watch.reference)
    assert send(watch, USUAL, NUM_BLOCKS) == []
