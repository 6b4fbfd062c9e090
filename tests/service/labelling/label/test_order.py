"""The order of kept photographs: two samples and a third source in turn, each drawn over time."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sopdeploy_service.labelling.kept import Kept
from sopdeploy_service.labelling.label.order import (
    LABELS_PER_DECIDING,
    SAMPLE_DAYS,
    Role,
    order_kept,
    role_of,
)
from tests.service.labelling.label.conftest import identity
from tests.service.labelling.test_kept import record_of

TODAY = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
REASONS = {"decides": ("sample",), "trains": ("sample",), "other": ("unknown",)}


def photo(number: int, role: Role, days_ago: int = 0, **changes: object) -> Kept:
    """A photograph whose near hash differs from that of each other number in 32 bits or so."""
    name = identity(number, decides=role == "decides")
    bits = (number * 0x9E3779B97F4A7C15) % 2**64
    fields = {
        "time": TODAY - timedelta(days=days_ago, minutes=5 * number % 600),
        "near_hash": f"{bits:016x}",
        "reasons": REASONS[role],
        "labels": ("a", "b"),
        "logits": (0.0, 0.0),
    }
    return Kept(Path(f"{name}.jpg"), record_of(name, **fields | changes))


def roles(photos: list[Kept]) -> list[Role]:
    return [role_of(one.record) for one in photos]


def days_ago(photos: list[Kept], role: Role) -> list[int]:
    return [(TODAY - one.record.time).days for one in photos if role_of(one.record) == role]


def test_two_of_five_decide_two_train_and_one_is_of_the_third_source() -> None:
    starts = {"decides": (0, 4), "trains": (100, 104), "other": (200, 205)}
    kept = [photo(number, role) for role, bounds in starts.items() for number in range(*bounds)]
    turn = ["decides", "trains", "decides", "trains", "other"]
    assert roles(order_kept(kept, [], {})) == [*turn, *turn, *["other"] * 3]
    assert len(turn) / turn.count("decides") == LABELS_PER_DECIDING


def test_reports_are_a_tenth_if_there_is_enough_of_all_others() -> None:
    kept = [photo(number, "decides") for number in range(16)]
    kept += [photo(number, "trains") for number in range(100, 116)]
    kept += [photo(number, "other") for number in range(200, 212)]
    kept += [photo(number, "other", reasons=("reported",)) for number in range(300, 400)]
    first = order_kept(kept, [], {})[:40]
    assert sum("reported" in one.record.reasons for one in first) == 4


@pytest.mark.parametrize("role", ["decides", "trains"])
def test_each_day_has_its_turn_the_newest_first(role: Role) -> None:
    """There are many photographs of the oldest day, and two of each other one."""
    kept = [photo(number, role, days_ago=number % 3) for number in range(6)]
    kept += [photo(number, role, days_ago=3) for number in range(6, 40)]
    assert days_ago(order_kept(kept, [], {}), role)[:8] == [0, 1, 2, 3] * 2


def test_the_newest_two_weeks_come_first() -> None:
    kept = [photo(number, "trains", days_ago=number) for number in range(SAMPLE_DAYS + 5)]
    kept += [photo(100 + number, "trains", days_ago=number) for number in range(SAMPLE_DAYS)]
    found = days_ago(order_kept(kept, [], {}), "trains")
    assert max(found[: 2 * SAMPLE_DAYS]) == SAMPLE_DAYS - 1


def test_during_an_alarm_the_days_since_it_began_come_first() -> None:
    kept = [photo(number, "trains", days_ago=number % 10) for number in range(40)]
    since = TODAY - timedelta(days=1, hours=12)
    found = days_ago(order_kept(kept, [], {"photos": since}), "trains")
    assert found[:8] == [0, 1] * 4
    assert days_ago(order_kept(kept, [], {"other": since}), "trains")[:4] == [0, 1, 2, 3]


COPIES = {
    "a copy on another day": ("00" * 7 + "01", 3, True),
    "another object that looks alike, on another day": ("00" * 7 + "0f", 3, False),
    "a frame of the same object": ("00" * 7 + "ff", 0, True),
}


@pytest.mark.parametrize("case", COPIES)
@pytest.mark.parametrize("is_labelled", [False, True])
def test_copies_come_last_also_of_photographs_that_have_a_label(case, is_labelled) -> None:
    near_hash, days, is_copy = COPIES[case]
    first = photo(0, "decides", near_hash="00" * 8, time=TODAY)
    taken_at = TODAY - timedelta(days=days, seconds=2)
    second = photo(12, "decides", near_hash=near_hash, time=taken_at)
    others = [photo(number, "decides", days_ago=5) for number in range(1, 4)]
    if is_labelled:
        found = order_kept([second, *others], [first.record], {})
    else:
        found = order_kept([first, second, *others], [], {})
    assert (found[-1] == second) is is_copy


def test_half_of_the_sample_decides() -> None:
    records = [photo(0, "decides").record.model_copy(update={"image": f"{number:016x}{0:016x}.jpg"})
               for number in range(1000)]  # fmt: skip
    assert [role_of(record) for record in records].count("decides") == 500
