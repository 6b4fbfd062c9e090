"""Class names in a file: one name a line, or JSON.

JSON is a list, a dict from numbers to names or back, or has one of these under a key such as
`id2label`. What may be more than a name is refused, because the order of the logits and the names
in answers depend on it; the texts of a JSON list are names as they are.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sopdeploy.base.config import parse_json
from sopdeploy.base.files import MAX_NAMES_BYTES, read_text
from sopdeploy.base.names import label_problem
from sopdeploy.errors import ConfigError, shorten

_ADVICE = (
    'write one name per line in the order of the logits, or a JSON list such as ["cat", "dog"]'
)
_MAX_TABLE_LEVELS = 3
# Where tools keep class names among other values, as in the config.json of a model
_KEYS = (
    "id2label",
    "label2id",
    "class_to_idx",
    "idx_to_class",
    "names",
    "labels",
    "classes",
    "class_names",
    "label_names",
)
# A number beside a name, as tools write it
_LEADING = re.compile(r"(\d+)(?:\s*[,;:)=\t]\s*|\.(?!\d)\s*|\s+)(\S.*)")
_TRAILING = re.compile(r"(\S.*?)(?:\s*[,;:=\t]\s*|\s+)(\d+)")
# of tables; `tench, Tinca tinca` is one name
_CELL_ENDS = (re.compile(r"\t"), re.compile(r"[,;](?!\s)"))
# What lines of other files are
_NO_NAMES = {
    "begins with a quote": re.compile(r"[\"'`].*"),
    "begins with a bullet": re.compile(r"[-*+\u2022\u2013]\s.*"),
    "may be a comment": re.compile(r"(#|//).*"),
    "has a bracket and no name": re.compile(r"[\[\](){}<>,;]+|.*[\[({]"),
    "has a key": re.compile(r"[\w-]+:(\s.*)?"),
    "ends with a comma": re.compile(r".*[,;]"),
}


def read_class_names(file: Path) -> tuple[str, ...]:
    """Read the class names in *file*, in the order of the logits.

    Raises `ConfigError` if the file cannot be read, if it is not certain what the names are or
    their order, and if they cannot be classes.
    """
    try:
        text = read_text(file, MAX_NAMES_BYTES)
        names = tuple(name.strip() for name in _parse(text, file.suffix.lower()))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is not in UTF-8; save it in this encoding", setting="labels"
        ) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{file} cannot be read ({reason}); {_ADVICE}", setting="labels"
        ) from error

    if problem := label_problem(names):
        raise ConfigError(f"{file}: {problem}; correct the file", setting="labels")
    return names


def _parse(text: str, suffix: str) -> tuple[str, ...]:
    """Return the class names in *text*, in the order of the logits; raises `ValueError` if not certain."""
    if suffix == ".json" or text.lstrip()[:1] in ("[", "{"):
        return _find_names(parse_json(text))

    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
    if not any(lines):
        raise ValueError("holds no name")
    names = tuple(line for line in lines if line)
    _refuse_more_than_names(names)
    return names


def _find_names(data: Any) -> tuple[str, ...]:
    """Find the names in *data*, or under one of `_KEYS` in it; several keys must give the same names."""
    if (names := _names_of_value(data)) is not None:
        return names

    names_by_key = _names_by_key(data)

    if len(set(names_by_key.values())) > 1:
        raise ValueError(f"holds several lists of names ({', '.join(names_by_key)})")
    if not names_by_key:
        raise ValueError('not a list of names such as ["cat", "dog"]')
    return next(iter(names_by_key.values()))


def _names_by_key(data: Any) -> dict[str, tuple[str, ...]]:
    """Return the names under each of `_KEYS` in *data*, by their paths."""
    return {
        path: names
        for path, value in _find_keys(data)
        if (names := _names_of_value(value)) is not None
    }


def find_labels(content: Any) -> tuple[str, ...] | None:
    """Find the class names in *content*, a weight file, under one of `_KEYS` or in a table such as `metadata`.

    None if there are none, or different ones, or numbers that are not those of logits.
    """
    if not isinstance(content, dict):
        return None
    # Tables of tensors have no names of classes, but may have many keys.
    tables = {key: value for key, value in content.items() if not _has_tensors(value)}
    try:
        found = set(_names_by_key(tables).values())
    except ValueError:
        return None
    return found.pop() if len(found) == 1 else None


def _has_tensors(value: Any) -> bool:
    """Tell whether *value* is a table with tensors or arrays."""
    return isinstance(value, dict) and any(hasattr(each, "shape") for each in value.values())


def check_order(
    given: Sequence[str], in_weights: Sequence[str] | None, weights: Path
) -> tuple[str, ...]:
    """Check the class names *given* against those *in_weights*, the file of the network; return warnings.

    Other names are allowed, and said. Raises `ConfigError` for the same names in another order.
    """
    if in_weights is None or tuple(given) == tuple(in_weights):
        return ()
    if sorted(given) == sorted(in_weights):
        number = next(number for number, name in enumerate(given) if name != in_weights[number])
        raise ConfigError(
            f"have the classes of {weights} in another order: number {number} is {in_weights[number]} there, and "
            f"{given[number]} here; omit them, or correct their order",
            setting="labels",
        )
    return (
        f"the class names differ from those in {weights} ({shorten(list(in_weights))}), which are not used",
    )


def _find_keys(data: Any, levels: int = _MAX_TABLE_LEVELS) -> Iterator[tuple[str, Any]]:
    """Yield the values of `_KEYS` in *data*, with their paths."""
    for key, value in data.items() if isinstance(data, dict) and levels else ():
        if key in _KEYS:
            yield key, value
        for path, inner in _find_keys(value, levels - 1):
            yield f"{key}.{path}", inner


def _names_of_value(value: Any) -> tuple[str, ...] | None:
    """Return the names of a list, or of a dict from numbers to names or from names to numbers, else None.

    Raises `ValueError` for a dict whose numbers are not 0 to the number of names - 1.
    """
    if isinstance(value, list | tuple):
        return tuple(value) if value and all(isinstance(name, str) for name in value) else None
    if not isinstance(value, dict) or not value:
        return None

    keys = list(value)
    values = list(value.values())

    # Numbers may be the keys or, as in `class_to_idx`, the values.
    if all(map(_is_index, keys)) and all(isinstance(name, str) for name in values):
        by_number: Mapping[int, str] = {int(key): name for key, name in value.items()}
    elif all(isinstance(name, str) for name in keys) and all(map(_is_index, values)):
        by_number = {int(number): name for name, number in value.items()}
    else:
        return None

    if sorted(by_number) != list(range(len(value))):
        problem = f"its numbers must be 0 to {len(value) - 1}, each once (got {min(by_number)} to {max(by_number)})"
        raise ValueError(f"{problem}, so the order of the logits is not certain")
    return tuple(by_number[number] for number in range(len(value)))


def _is_index(value: Any) -> bool:
    """Return whether *value* is a number of a class, or the text of one."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return is_number or (
        isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 10
    )


def _refuse_more_than_names(lines: Sequence[str]) -> None:
    """Raise `ValueError` if *lines* may be more than plain names: numbers, columns or ids."""
    for position, line in enumerate(lines, 1):
        for problem, pattern in _NO_NAMES.items():
            if pattern.fullmatch(line):
                raise ValueError(f"name {position} {problem}: {line[:40]!r}")
    for cell_end in _CELL_ENDS:
        counts = {len(cell_end.findall(line)) for line in lines}
        if len(counts) == 1 and counts != {0}:
            raise ValueError(f"a table of {counts.pop() + 1} columns")
    if _are_numbered(lines):
        raise ValueError(
            "the names have numbers; leave them out, or write them as keys of JSON"
        )
    if len(lines) == 1 and "," in lines[0]:
        raise ValueError("all names stand in one line")
    if _begin_with_ids(lines):
        first_id = lines[0].split()[0]
        raise ValueError(f"each line begins with an id such as {first_id}; leave the ids out")


def _are_numbered(lines: Sequence[str]) -> bool:
    """Tell whether all *lines* begin with a number, or some begin or end with numbers that count them.

    A number of `grade 0` and `grade 1` belongs to the name.
    """
    leading = [match.groups() for line in lines if (match := _LEADING.fullmatch(line))]
    trailing = [match.groups()[::-1] for line in lines if (match := _TRAILING.fullmatch(line))]
    for numbered in (leading, trailing):
        numbers = [int(number) for number, _ in numbered]
        count_lines = numbers in ([*range(len(numbers))], [*range(1, len(numbers) + 1)])
        are_names = len({name for _, name in numbered}) == len(numbered)
        if len(numbered) > 1 and count_lines and are_names:
            return True
    return len(lines) > 1 and len(leading) == len(lines)


def _begin_with_ids(lines: Sequence[str]) -> bool:
    """Tell whether each of several *lines* is an id and a name.

    Ids have the same pattern of letters and digits, such as n01440764, and no two are equal.
    """
    words = [line.split(maxsplit=1) for line in lines]
    ids = {first for first, *_ in words}
    patterns = {re.sub(r"[^\W\d_]", "a", re.sub(r"\d", "9", one)) for one in ids}
    has_one_pattern = len(patterns) == 1 and "9" in min(patterns)
    has_names = all(len(parts) == 2 for parts in words)
    return has_one_pattern and has_names and len(lines) > 1 and len(ids) == len(lines)
