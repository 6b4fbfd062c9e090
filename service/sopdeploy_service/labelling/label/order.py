"""The order in which kept photographs are labelled: two random samples in turn, and a third source.

The uniform sample is divided by the hash of each file: one half *decides* about the next bundle,
the other half *trains* it. Both are drawn at random over time: one photograph of each day, the
newest day first, then a second one of each. During an alarm of drift, the days since it began come
first, because only photographs of these days show what has changed.

What is uncertain, rejected or reported is the third source. Of five photographs in turn, two decide,
two train, and one is of this source. So 60 labels, some of which will be copies or none of the classes,
give the 20 that a comparison needs.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime
from typing import Literal

from sopdeploy.images.near_hash import COPY_BITS, OBJECT_BITS
from sopdeploy_service.labelling.kept import Kept, KeptRecord

Role = Literal["decides", "trains", "other"]
LABELS_PER_DECIDING = 2.5  # by the turns of `order_kept`
SAMPLE_DAYS = 14  # newest days with traffic, from which the samples are drawn first
# Kept photographs can show one object if they came within so many seconds.
OBJECT_SECONDS = 60.0


def role_of(record: KeptRecord) -> Role:
    """Return what the label of a kept photograph is for."""
    if "sample" not in record.reasons:
        return "other"
    # The name is a hash of the file. Its first digits have put the file into the sample.
    return "decides" if int(record.image[8:16], 16) % 2 == 0 else "trains"


def order_kept(
    waiting: Sequence[Kept], labelled: Iterable[KeptRecord], alarms: Mapping[str, datetime]
) -> list[Kept]:
    """Order the photographs that wait: the two samples and the third source in turn, copies last.

    *labelled* are the records of photographs that have a label, whose copies need none. *alarms*
    are the begins of changes, by model.
    """
    copies = find_copies(waiting, labelled)
    sources: dict[Role, list[Kept]] = {"decides": [], "trains": [], "other": []}
    for photo in waiting:
        if photo.path.name not in copies:
            sources[role_of(photo.record)].append(photo)

    # Reports are in turn with what the network was not sure of.
    reported = [photo for photo in sources["other"] if "reported" in photo.record.reasons]
    unsure = [photo for photo in sources["other"] if "reported" not in photo.record.reasons]
    others = take_turns([spread(reported, alarms), spread(unsure, alarms)])

    decides, trains = (spread(sources[role], alarms) for role in ("decides", "trains"))
    turns = take_turns([decides[::2], trains[::2], decides[1::2], trains[1::2], others])
    last = [photo for photo in waiting if photo.path.name in copies]
    return [*turns, *reversed(last)]


def take_turns(sources: Sequence[Sequence[Kept]]) -> list[Kept]:
    """Take one photograph of each source in turn; a source that has ended is left out."""
    rounds = itertools.zip_longest(*sources)
    return [photo for one in rounds for photo in one if photo is not None]


def spread(photos: Sequence[Kept], alarms: Mapping[str, datetime]) -> list[Kept]:
    """Order *photos* so that each day has its turn, the newest day first; in a day, at random.

    Days since the begin of a change, of *alarms*, come first, then the newest `SAMPLE_DAYS`.
    """
    days: dict[date, list[Kept]] = {}
    changed: dict[date, list[Kept]] = {}

    for photo in sorted(photos, key=_random_number):
        begin = alarms.get(photo.record.model)
        since_begin = begin is not None and photo.record.time >= begin
        (changed if since_begin else days).setdefault(photo.record.time.date(), []).append(
            photo
        )

    newest_first = sorted(days, reverse=True)
    parts = (
        (sorted(changed, reverse=True), changed),
        *((part, days) for part in (newest_first[:SAMPLE_DAYS], newest_first[SAMPLE_DAYS:])),
    )
    return [
        photo
        for names, of_day in parts
        for photo in take_turns([of_day[name] for name in names])
    ]


def _random_number(photo: Kept) -> str:
    """Return digits of the hash of the file that neither the sample nor the role depends on."""
    return photo.path.stem[16:]


def find_copies(waiting: Sequence[Kept], labelled: Iterable[KeptRecord]) -> set[str]:
    """Name the photographs of *waiting* that show what an earlier one or a *labelled* one shows.

    These are copies, at any time, and further photographs of an object. Of photographs that wait,
    one of the sample counts before one of the third source.
    """
    records = [photo.record for photo in waiting]
    records.sort(key=lambda record: role_of(record) == "other")  # stable

    copies = set[str]()
    seen = Shown(labelled)
    for record in records:
        if seen.shows(record):
            copies.add(record.image)
        else:
            seen.add(record)
    return copies


class Shown:
    """Photographs by their times and near hashes, to find others that show the same."""

    def __init__(self, records: Iterable[KeptRecord] = ()) -> None:
        self._photos = list(map(_describe, records))

    def add(self, record: KeptRecord) -> None:
        """Add a photograph."""
        self._photos.append(_describe(record))

    def shows(self, record: KeptRecord) -> bool:
        """Tell whether one of the photographs is a copy of that of *record*, or shows its object."""
        taken_at, near_hash = _describe(record)
        for time, other in self._photos:
            bits = (near_hash ^ other).bit_count()
            is_soon = abs(taken_at - time) <= OBJECT_SECONDS
            if bits <= COPY_BITS or (is_soon and bits <= OBJECT_BITS):
                return True
        return False


def _describe(record: KeptRecord) -> tuple[float, int]:
    """Return the time and the near hash of a photograph as numbers."""
    return record.time.timestamp(), int(record.near_hash, 16)
