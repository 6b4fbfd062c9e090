"""Which known names a wrong name may mean, and the question "did you mean ...?" of all messages."""

from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher

CUTOFF = 0.6  # of the ratio of `SequenceMatcher`
MARGIN = 0.05  # to the ratio of the nearest name
MAX_NAMES = 3
# Comparing takes time that grows with the square of the length, and a client may send any name.
MAX_COMPARED = 100


def nearest_names(wanted: str, names: Iterable[str]) -> list[str]:
    """List at most three of *names* that *wanted* may mean, the nearest first.

    A name that is equal but for case, or that ends with a dot and *wanted*, as `optimizer.lr`
    does with `lr`, is nearer than any other. If none is near, those that have *wanted* as a part
    between hyphens are meant.
    """
    wanted = wanted[:MAX_COMPARED].lower()
    # Of names that differ in case only, the first one.
    by_lower: dict[str, str] = {}
    for name in names:
        by_lower.setdefault(name.lower(), name)
    if not wanted:
        return []

    if wanted in by_lower:
        return [by_lower[wanted]]
    same_end = sorted(name for name in by_lower if name.endswith(f".{wanted}"))
    if same_end:
        return [by_lower[name] for name in same_end[:MAX_NAMES]]

    # The nearest first; of those that are as near, the first one of *names*.
    matcher = SequenceMatcher(b=wanted)
    ratios = {}
    for name in by_lower:
        matcher.set_seq1(name)
        # Upper bounds, which take less time, exclude most names.
        if matcher.real_quick_ratio() < CUTOFF or matcher.quick_ratio() < CUTOFF:
            continue
        ratio = matcher.ratio()
        if ratio >= CUTOFF:
            ratios[name] = ratio

    ranked = sorted(ratios, key=lambda name: -ratios[name])

    # The name of a family, such as `gsop`, is a part of the names of its networks and recipes.
    if not ranked:
        of_family = [name for name in by_lower if wanted in name.split("-")]
        return [by_lower[name] for name in of_family[:MAX_NAMES]]

    # Others only if they are about as near as the nearest one.
    return [
        by_lower[name]
        for name in ranked[:MAX_NAMES]
        if ratios[name] >= ratios[ranked[0]] - MARGIN
    ]


def did_you_mean(
    wanted: str, names: Iterable[str] | Mapping[str, str], otherwise: str = ""
) -> str:
    """Ask "did you mean A, B or C?" with the names nearest to *wanted*; *otherwise* if none is near.

    *names* may be a mapping from names to what the question shows for them.
    """
    shown = names if isinstance(names, Mapping) else {name: name for name in names}
    near = nearest_names(wanted, shown)
    return ask_for(*[shown[name] for name in near]) if near else otherwise


def ask_for(*texts: str) -> str:
    """Ask "did you mean A?", or "did you mean A, B or C?"."""
    *first, last = texts
    return f"did you mean {', '.join(first)} or {last}?" if first else f"did you mean {last}?"
