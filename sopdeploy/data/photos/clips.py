"""Groups of images that one clip or one object shows, by what their names and times have in common.

Frames of a real clip do not always resemble each other as copies do: an object comes nearer, or
turns. But their files are often named alike, `00001_00000.png` and `00001_00001.png`, or
numbered in sequence, or taken within seconds. Names of other photographs are, too, so the
images decide: a relation between images counts if the most similar other image of the class is
related far more often than by chance, and about as similar as frames are. Relations that are
found more often than by chance, but not so clearly, are only described.

Relations are: names with the same text and the same first or last numbers, times in a chain of
short gaps, and neighbors in the sequence of the names. A sequence is divided where the next
images are no more similar than distant ones.

Letters: N images, K nearest images of the same class.
"""

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from shlex import quote
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sopdeploy.data.photos.copies import NO_PAIRS, Groups, connect, number_classes
from sopdeploy.data.photos.photo import LabeledImages
from sopdeploy.images.metadata import NO_TIME

NEAREST = 32  # images of the class that are known for each image, the most similar first
# Share of the images beyond chance whose most similar image is related: 0.5 to 1.0 for frames
# of clips and turntables, 0.3 for tiles and slices of one object, 0 to 0.1 for others.
CLEAR = 0.45
DOUBTFUL = 0.25
# median cosine of frames with the most similar one; those of one camera or place reach 0.3
SIMILAR = 0.35
# Images that chance does not relate, and standard deviations
MIN_EVIDENCE = 4.0
MIN_DEVIATIONS = 4.0
# Images that share a pattern of names, and patterns that are compared
MIN_IMAGES = 6
MAX_PATTERNS = 8
ONE_GROUP = 0.5  # share of a class from which on a pattern of names does not tell its objects
WINDOW = 2  # neighbors in a sequence, on each side
CHAIN_SECONDS = 10  # between two photographs of a burst
# what related images share
START = "start"
END = "end"
TIME = "time"
SEQUENCE = "sequence"
# of the cosines of distant images, which those of next frames exceed
LINK_QUANTILES = (
    0.9,
    0.75,
)
_BLOCK = 2**25  # cosines that are computed at once


class Clips(NamedTuple):
    """The `groups` (N,) of images of one clip or object, and pairs of images; None without such ones.

    `certain` are two images of a group that its copies do not explain, `doubtful` two that may
    show one object, but are not a group. `pattern` is a regular expression that groups the
    doubtful ones by name, or empty.
    """

    groups: Groups
    certain: tuple[int, int] | None = None
    doubtful: tuple[int, int] | None = None
    pattern: str = ""

    def select_pairs(self, pairs: NDArray[np.intp]) -> NDArray[np.intp]:
        """Select the *pairs* (2, P) of near-duplicates that do not join two clips.

        If names tell the objects, some frames of different ones resemble each other as copies
        do. Without a `certain` clip, all pairs stay.
        """
        if self.certain is None:
            return pairs
        # A pair stays if both are in one group, or if one of them is in a group of its own.
        group_2P = self.groups[pairs]
        is_same_group_P = group_2P[0] == group_2P[1]
        is_in_clip_2P = np.bincount(self.groups)[group_2P] > 1
        return pairs[:, is_same_group_P | ~is_in_clip_2P.all(axis=0)]


class _Name(NamedTuple):
    """A name without suffix: texts and numbers in turn, and its template.

    In a template, `a` stands for letters and `#` for a number: `a_#-#` for `frame_12-3`.
    """

    texts: tuple[str, ...]
    numbers: tuple[int, ...]
    template: str

    @classmethod
    def of(cls, identity: str) -> "_Name":
        """Divide the path *identity*; the folders are a part of the first text, and their digits are text."""
        folder, slash, file = identity.rpartition("/")
        stem = file.rpartition(".")[0] or file
        # Texts and numbers in turn; the first one and the last one are texts.
        parts = re.split(r"(\d+)", stem)
        texts = parts[::2]
        numbers = tuple(map(int, parts[1::2]))
        template = re.sub(r"[^\W\d_]+", "a", "#".join(texts))
        return cls((folder + slash + texts[0], *texts[1:]), numbers, template)


class _Relation(NamedTuple):
    """Related images have equal `runs` (N,); in a sequence, also `ranks` (N,) at most `WINDOW` apart.

    It relates names of one `template` by what is `shared`; `pattern` is a regular expression
    for equal parts.
    """

    template: str
    shared: str
    runs: NDArray[np.int64]
    ranks: NDArray[np.int64] | None = None
    pattern: str = ""


class _Measured(NamedTuple):
    """How much more often than by chance the most similar image outside of the group is related.

    `excess` is the share beyond chance (Cohen, "A Coefficient of Agreement for Nominal Scales",
    1960). Of the images whose most similar one is related, `similar` is the median cosine with
    it, and `pair` the most similar pair.
    """

    excess: float
    similar: float
    pair: tuple[int, int]
    relation: _Relation

    @property
    def is_clear(self) -> bool:
        """Whether the related images show one clip or object."""
        return self.excess >= CLEAR and self.similar >= SIMILAR


def describe_clip(files: Sequence[str]) -> str:
    """Describe groups of images that were found; *files* are two of them."""
    return (
        f"files named like {' and '.join(files)} are frames of one clip, or show "
        "one object, by their names and likeness: they share a fold; if all files "
        "show different ones, give --set data.groups='.*'"
    )


def describe_possible_clip(files: Sequence[str], pattern: str) -> str:
    """Describe images that may be a group, such as *files*; *pattern* finds what their names share."""
    by_name = f"--set data.groups={quote(pattern)}" if pattern else "--set data.groups=PATTERN"
    return (
        f"files named like {' and '.join(files)} resemble each other more than "
        "other files of their class; if they are frames of one clip, or show one "
        "object, the accuracy is too high: give each object a folder or, if a "
        f"part of the name tells it, {by_name}"
    )


def clips_of_images(
    images: LabeledImages,
    times: NDArray[np.int64],
    vectors: NDArray[np.float32],
    groups: Groups,
) -> Clips:
    """Find the clips among *images* by `find_clips`; without *vectors* (N, D), the *groups* (N,) stay."""
    if not len(vectors):
        return Clips(groups)
    names = [images.identity(index) for index in range(len(images))]
    return find_clips(names, times, number_classes(images.targets), vectors, groups)


def find_clips(
    names: Sequence[str],
    times: NDArray[np.int64],
    classes: NDArray[np.int64],
    vectors: NDArray[np.float32],
    groups: Groups,
) -> Clips:
    """Join the *groups* (N,) of images that show one clip or object.

    *names* (N,) are paths, *times* (N,) seconds or `NO_TIME`, *classes* (N,) numbers. *vectors*
    (N, D) have length 1; they are whitened, as those of `copies.NearDuplicates`, so that they lack
    what the images of a class have in common.
    """
    relations = _list_relations(names, times, classes)
    if not relations:
        return Clips(groups)
    nearest_NK, cosines_NK = _nearest_of_class(vectors, classes)

    def measure(relation: _Relation, groups: Groups) -> _Measured | None:
        return _measure(relation, groups, classes, nearest_NK, cosines_NK)

    # Join the images of each relation that is clear. Names of one template have several numbers:
    # the first clear relation tells which of them identify the clips, and relations by the other
    # ones, those of frames and views, are skipped.
    certain: tuple[int, int] | None = None  # the pair of the first clear relation
    remaining: list[_Measured] = []  # what is related and not joined
    clips_share: dict[str, str] = {}  # what identifies the clips, by the template of names
    for relation in relations:
        if clips_share.get(relation.template, relation.shared) != relation.shared:
            continue

        measured = measure(relation, groups)
        if measured is None:
            continue
        if not measured.is_clear:
            remaining.append(measured)
            continue

        if certain is None:
            certain = measured.pair
        clips_share[relation.template] = relation.shared
        if relation.ranks is None:  # no sequence
            groups = connect(len(names), NO_PAIRS, groups, relation.runs)
            continue

        # A lower quantile divides the sequence less; it is tried if the sequence is still clear
        # between the groups that a higher one has joined.
        for quantile in LINK_QUANTILES:
            links = _link_sequence(relation.runs, relation.ranks, vectors, quantile)
            groups = connect(len(names), links, groups)
            measured = measure(relation, groups)
            if measured is None or not measured.is_clear:
                break
        if measured is not None:
            remaining.append(measured)

    doubtful = _find_doubtful(remaining, groups, names, classes)
    if doubtful is None:
        return Clips(groups, certain)
    return Clips(groups, certain, doubtful.pair, doubtful.relation.pattern)


def _find_doubtful(
    remaining: Sequence[_Measured],
    groups: Groups,
    names: Sequence[str],
    classes: NDArray[np.int64],
) -> _Measured | None:
    """Find the clearest of the *remaining* relations that are worth telling the user; None without any.

    The images of its `pair` are not joined in *groups* (N,). If it has a pattern, this does not
    make most of a class one group (`divides_classes`).
    """
    doubtful = []
    for measured in remaining:
        first, second = measured.pair
        is_joined = groups[first] == groups[second]  # by another relation
        pattern = measured.relation.pattern
        if not is_joined and (not pattern or divides_classes(pattern, names, classes)):
            doubtful.append(measured)
    return max(doubtful, key=lambda measured: measured.excess, default=None)


def divides_classes(pattern: str, names: Sequence[str], classes: NDArray[np.int64]) -> bool:
    """Tell whether *pattern* groups files without making most of a class one group (`ONE_GROUP`).

    A part that most names of a class share tells the class, or where its files are from.
    """
    # Count the images of each group in each class; a name without the pattern is its own group.
    groups = Counter[tuple[int, str]]()
    for name, label in zip(names, classes.tolist(), strict=True):
        folder, _, file = name.rpartition("/")
        match = re.search(pattern, file.rpartition(".")[0] or file)
        groups[label, f"{folder}/{match.group()}" if match else name] += 1

    sizes = Counter(classes.tolist())
    is_one_group = any(
        count > 1 and count > ONE_GROUP * sizes[label] for (label, _), count in groups.items()
    )
    return not is_one_group and len(groups) < len(names)


def _list_relations(
    names: Sequence[str], times: NDArray[np.int64], classes: NDArray[np.int64]
) -> list[_Relation]:
    """List the relations that names and times suggest: the smallest groups first, sequences last.

    They are those of the `MAX_PATTERNS` most frequent templates that `MIN_IMAGES` names have, and
    of times if as many images have one.
    """
    parsed = [_Name.of(name) for name in names]
    groupings: list[_Relation] = []
    sequences: list[_Relation] = []

    # Names of one template, such as `a_#-#` for `frame_12-3`.
    templates = Counter(name.template for name in parsed if name.numbers)
    for template, size in templates.most_common(MAX_PATTERNS):
        if size < MIN_IMAGES:
            break
        by_numbers, sequence = _relate_by_numbers(template, parsed, classes)
        groupings += by_numbers
        sequences.append(sequence)

    # Photographs of a class that were taken in a chain of short gaps.
    timed = np.flatnonzero(times != NO_TIME)
    if len(timed) >= MIN_IMAGES:
        timed = timed[np.lexsort((times[timed], classes[timed]))]
        is_new_chain = (np.diff(times[timed]) > CHAIN_SECONDS) | (np.diff(classes[timed]) != 0)
        chains = np.concatenate([[0], np.cumsum(is_new_chain)])
        runs = _number_runs(len(names), timed.tolist(), chains.tolist())
        groupings.append(_Relation("", TIME, runs))

    # Groups are numbered from 0. The more there are, the smaller they are, so the relation with
    # the largest number is the first.
    groupings.sort(key=lambda relation: -relation.runs.max())
    return groupings + sequences


def _relate_by_numbers(
    template: str, parsed: Sequence[_Name], classes: NDArray[np.int64]
) -> tuple[list[_Relation], _Relation]:
    """List how names of one *template* with equal texts are related by some of their numbers.

    Also returns the sequence of their numbers. Names of two classes are not related.
    """
    count = len(parsed)
    members = [index for index, name in enumerate(parsed) if name.template == template]
    class_and_texts = {i: (int(classes[i]), parsed[i].texts) for i in members}

    # Which numbers are equal: the first 0 to `length` - 1 of them, or the last `length` - 1 to 1.
    length = len(parsed[members[0]].numbers)
    # `digits[num]` is a regular expression for *num* numbers.
    digits = [r"\D+".join([r"\d+"] * num) for num in range(length)]
    starts = [(START, slice(num), rf"^\D*{digits[num]}") for num in range(length)]
    ends = [(END, slice(-num, None), rf"{digits[num]}\D*$") for num in range(length - 1, 0, -1)]

    groupings = []
    for shared, which, pattern in starts + ends:
        keys = [(class_and_texts[i], parsed[i].numbers[which]) for i in members]
        if len(set(keys)) < len(keys):  # some names are related
            runs = _number_runs(count, members, keys)
            groupings.append(_Relation(template, shared, runs, pattern=pattern))

    # Neighbors among the names with equal texts.
    by_number = sorted(members, key=lambda i: (class_and_texts[i], parsed[i].numbers))
    runs = _number_runs(count, by_number, [class_and_texts[i] for i in by_number])
    ranks = np.zeros(count, np.int64)
    ranks[by_number] = np.arange(len(by_number))
    return groupings, _Relation(template, SEQUENCE, runs, ranks)


def _number_runs(count: int, members: list[int], keys: Sequence[Hashable]) -> NDArray[np.int64]:
    """Return the number (N,) of the key of each image: of *members* from 0, in the order of *keys*.

    Each other image has a negative number of its own.
    """
    number_of_key = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    runs = -1 - np.arange(count)  # different ones, because these images are related to none
    runs[members] = [number_of_key[key] for key in keys]
    return runs


def _nearest_of_class(
    vectors: NDArray[np.float32], classes: NDArray[np.int64]
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Find the `NEAREST` most similar images of the class of each image, and their cosines, (N, K) each.

    Where there are fewer, the image itself is listed, with a cosine of -1.
    """
    count = len(classes)
    nearest_NK = np.repeat(np.arange(count)[:, None], NEAREST, axis=1)
    cosines_NK = np.full((count, NEAREST), -1.0, np.float32)

    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        num_kept = min(NEAREST, len(members) - 1)
        if num_kept == 0:
            continue

        # Blocks of images, because the cosines of many take much memory.
        size = max(1, _BLOCK // len(members))
        for start in range(0, len(members), size):
            block = members[start : start + size]
            cosines = vectors[block] @ vectors[members].T
            cosines[block[:, None] == members] = -2.0  # an image itself is the last one
            best = np.argsort(-cosines, axis=1, kind="stable")[:, :num_kept]
            nearest_NK[block, :num_kept] = members[best]
            cosines_NK[block, :num_kept] = np.take_along_axis(cosines, best, axis=1)

    return nearest_NK, cosines_NK


def _measure(
    relation: _Relation,
    groups: Groups,
    classes: NDArray[np.int64],
    nearest_NK: NDArray[np.intp],
    cosines_NK: NDArray[np.float32],
) -> _Measured | None:
    """Measure *relation*; None if it is hardly more frequent than by chance, or images are too few.

    *nearest_NK* and *cosines_NK* are the results of `_nearest_of_class`.
    """
    runs = relation.runs
    ranks = relation.ranks

    # The most similar image of the class outside of the group. It is a hit if it is related. A
    # cosine of -1 stands for no image.
    is_outside_NK = (groups[nearest_NK] != groups[:, None]) & (cosines_NK > -1)
    first_N = is_outside_NK.argmax(axis=1)
    index_N = np.arange(len(runs))
    near_N = nearest_NK[index_N, first_N]
    cosine_N = cosines_NK[index_N, first_N]
    is_hit_N = runs[near_N] == runs
    if ranks is not None:
        is_hit_N &= np.abs(ranks[near_N] - ranks) <= WINDOW

    # The probability of a hit by chance: the share of related images among those of the class
    # outside of the group.
    outside_class_N = _count_equal(classes) - _count_equal(classes, groups)
    chance_N = _count_related(relation, groups) / np.maximum(outside_class_N, 1)

    # How many more hits there are than by chance, among the images where both a hit and none is
    # possible.
    counted_N = is_outside_NK.any(axis=1) & (chance_N > 0) & (chance_N < 1)
    chance = chance_N[counted_N]
    hits = is_hit_N[counted_N]
    evidence = float((1 - chance).sum())
    beyond = float(hits.sum() - chance.sum())
    deviation = np.sqrt((chance * (1 - chance)).sum())  # of the number of hits by chance
    if evidence < MIN_EVIDENCE or beyond < MIN_DEVIATIONS * deviation:
        return None
    excess = beyond / evidence
    if excess < DOUBTFUL:
        return None

    # The most similar pair of related images, and how similar such pairs are.
    hit_indices = np.flatnonzero(counted_N & is_hit_N)
    nearest_hit = hit_indices[np.argmax(cosine_N[hit_indices])]
    first, second = sorted((int(nearest_hit), int(near_N[nearest_hit])))
    similar = float(np.median(cosine_N[hit_indices]))
    return _Measured(excess, similar, (first, second), relation)


def _count_related(relation: _Relation, groups: Groups) -> NDArray[np.int64]:
    """Count for each image (N,) the images outside of its group that *relation* relates to it."""
    runs = relation.runs
    ranks = relation.ranks
    if ranks is None:
        return _count_equal(runs) - _count_equal(runs, groups)

    # In a sequence, the images of a run that are at most `WINDOW` places apart.
    related_N = np.zeros(len(runs), np.int64)
    order = np.lexsort((ranks, runs))
    for step in range(1, WINDOW + 1):
        earlier = order[:-step]
        later = order[step:]
        are_related = (runs[earlier] == runs[later]) & (groups[earlier] != groups[later])
        related_N[earlier] += are_related
        related_N[later] += are_related
    return related_N


def _count_equal(*keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count for each image (N,) those with its values in all *keys* (N,), itself included."""
    _, number_N, counts = np.unique(
        np.stack(keys), axis=1, return_inverse=True, return_counts=True
    )
    counts_N: NDArray[np.int64] = counts[number_N.reshape(-1)]
    return counts_N


def _link_sequence(
    runs: NDArray[np.int64],
    ranks: NDArray[np.int64],
    vectors: NDArray[np.float32],
    quantile: float,
) -> NDArray[np.intp]:
    """Return the pairs (2, P) of neighbors in sequences that belong together.

    The images with equal *runs* (N,), none below 0, are a sequence, in the order of *ranks* (N,).
    The gap between two neighbors is judged by the largest cosine of two images, at most two apart,
    on either side of it. The neighbors belong together if this cosine exceeds the *quantile* of
    the cosines of images half a sequence apart.
    """
    # The images of each sequence, in its order; images with a negative run are in none.
    order = np.lexsort((ranks, runs))
    order = order[runs[order] >= 0]
    starts = np.flatnonzero(np.diff(runs[order], prepend=-1))
    sequences = np.split(order, starts[1:])

    neighbors = []  # (2, gaps) of each sequence
    cosines_of_gaps = []
    distant_cosines = []
    for members in sequences:
        rows = vectors[members]
        count = len(members)
        if count < 2:
            continue

        # The largest cosine across each gap: of its two neighbors, or of images two apart, which
        # span two gaps.
        cosines = (rows[:-1] * rows[1:]).sum(axis=1)
        cosines_over_two = (rows[:-2] * rows[2:]).sum(axis=1)
        cosines[:-1] = np.maximum(cosines[:-1], cosines_over_two)
        cosines[1:] = np.maximum(cosines[1:], cosines_over_two)
        neighbors.append(np.stack([members[:-1], members[1:]]))
        cosines_of_gaps.append(cosines)

        half = count // 2
        if half > WINDOW:
            distant_cosines.append((rows[:-half] * rows[half:]).sum(axis=1))

    # Without long sequences, nothing tells how similar distant images are.
    if not distant_cosines:
        return NO_PAIRS
    bound = np.quantile(np.concatenate(distant_cosines), quantile)
    belong_together = np.concatenate(cosines_of_gaps) > bound
    return np.concatenate(neighbors, axis=1)[:, belong_together]
