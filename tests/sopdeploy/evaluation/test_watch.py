"""What is compared with what, and when an alarm begins and ends: blocks are numbers here."""

from collections.abc import Sequence

import pytest

from sopdeploy.evaluation.drift import Comparison
from sopdeploy.evaluation.watch import (
    END_BLOCKS,
    NEWEST_BLOCKS,
    NUM_BLOCKS,
    UNSURE,
    Comparisons,
    News,
    Watch,
)

USUAL, CHANGED, MENDED = 0, 1, 2  # a mended block looks changed, but scores as a usual one


def compare(reference: Sequence[int], window: Sequence[int]) -> Comparisons:
    """An alarm if most of *window* are blocks that the reference has not."""

    def judge(kinds: set[int]) -> Comparison:
        share = sum(block in kinds and block not in reference for block in window) / len(window)
        return Comparison(share, 0.0 if share > 0.5 else 1.0, rises=False)

    return {"image": judge({CHANGED, MENDED}), "score": judge({CHANGED})}


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


# blocks sent: those of the reference and of the window, which then is as large as a full one
GROWTH = {
    "the first comparison": (8, (4, 4)),
    "a small reference grows behind the newest blocks": (16, (12, 4)),
    "then, the window grows to what is compared": (24, (12, 12)),
    "the reference grows behind it": (42, (30, 12)),
    "it is complete": (52, (40, 12)),
    "the window grows": (70, (40, 30)),
    "a full window replaces it": (80, (40, 0)),
}


@pytest.mark.parametrize("case", GROWTH)
def test_the_reference_grows_behind_the_newest_blocks(case) -> None:
    count, expected = GROWTH[case]
    watch = Watch[int]()
    send(watch, USUAL, count)
    assert (len(watch.reference), len(watch.window)) == expected


def test_the_reference_does_not_grow_during_an_alarm() -> None:
    watch = Watch[int]()
    send(watch, USUAL, 20)
    [(_, news)] = send(watch, CHANGED, 30)
    assert news == "begins"
    assert set(watch.reference) == {USUAL}


# changed blocks, usual ones after them: blocks of the alarm
SEEN = {
    "the newest 100": (4, 0, 4),
    "the newest 100, 200 and 300": (7, 0, 4),
    "the newest 200 only": (5, 2, 8),
    "the newest 300 only": (7, 4, 12),
}


@pytest.mark.parametrize("case", SEEN)
def test_an_alarm_has_the_fewest_blocks_that_show_the_change(case) -> None:
    num_changed, num_usual, expected = SEEN[case]
    window = [*[USUAL] * 25, *[CHANGED] * num_changed, *[USUAL] * num_usual]
    watch = Watch([USUAL] * NUM_BLOCKS, window)
    _, news = watch.test(compare)
    assert (news, watch.alarm_blocks, len(watch.window)) == ("begins", expected, expected)


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
    assert len(watch.reference) > NEWEST_BLOCKS


def test_a_bundle_that_comes_without_an_alarm_begins_none(watch) -> None:
    watch.replace(watch.reference)
    assert send(watch, USUAL, NUM_BLOCKS) == []
