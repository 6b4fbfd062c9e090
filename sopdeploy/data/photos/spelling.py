"""Names of classes and files that look the same.

File systems encode a letter such as `Ä` in two ways, which look the same and are the same name
(`normalize`). Names that differ only in case, spaces or variants of letters are different, but
easily confused (`lookalike_key`).
"""

import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from sopdeploy.base.names import label_problem
from sopdeploy.errors import DataError


def normalize(name: str) -> str:
    """Return the *name* of a file or class in the encoding that all its spellings share (NFC)."""
    return unicodedata.normalize("NFC", name)


def lookalike_key(name: str) -> str:
    """Return what names share that are easily confused: *name* without case, variants and extra spaces."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def hint_at_spelling(unknown: Collection[str], known: Collection[str]) -> str:
    """Describe confusable classes, *unknown* and *known*; "" without any, or if none is *unknown*."""
    lines = describe_confusable([*unknown, *known]) if unknown else []
    return f" ({'; '.join(lines)})" if lines else ""


def describe_confusable(names: Iterable[str]) -> list[str]:
    """Describe each set of *names* of classes that are easily confused."""
    alike = defaultdict[str, list[str]](list)
    for name in sorted(set(names)):
        alike[lookalike_key(name)].append(name)
    return [
        f"{' and '.join(map(repr, several))} are different classes; rename one if "
        "they are the same"
        for several in alike.values()
        if len(several) > 1
    ]


def check_labels(where: Path, labels: Sequence[str]) -> None:
    """Raise `DataError` for the first of *labels*, of images in *where*, that cannot name a class."""
    if problem := label_problem(labels):
        raise DataError(f"{where}: {problem}; rename the class")
