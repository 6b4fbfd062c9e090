"""Class names in the files of other tools: lines, columns, JSON, YAML and Python dictionaries.

A number, quotes or a bullet around a name are removed if all lines have them. What may be more
than a name is refused, because the order of the logits and the names in answers depend on it;
the texts of a JSON list are names as they are.
"""

import ast
import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sopdeploy.config import parse_json
from sopdeploy.errors import ConfigError
from sopdeploy.files import MAX_NAMES_BYTES, read_text
from sopdeploy.names import label_problem

_ADVICE = (
    'write one name per line in the order of the logits, or a JSON list such as ["cat", "dog"]'
)
MAX_LITERAL_BYTES = 1_000_000  # of YAML and of Python dictionaries, whose parsers are slow
_MAX_TABLE_LEVELS = 3
# Where tools keep class names among other values, as in the config.json of a model or the
# data.yaml of YOLO.
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
_LEADING = re.compile(r"(?P<index>\d+)(?:\s*[,;:)=\t]\s*|\.(?!\d)\s*|\s+)(?P<name>\S.*)")
_TRAILING = re.compile(r"(?P<name>\S.*?)(?P<between>\s*[,;:=\t]\s*|\s+)(?P<index>\d+)")
_BULLET = re.compile(r"[-*+\u2022\u2013]\s+")
_QUOTED = re.compile(r"""(["'`])((?:(?!\1).)*)\1""")
# of tables; `tench, Tinca tinca` is one name
_CELL_ENDS = (re.compile(r"\t"), re.compile(r"[,;](?!\s)"))
# What lines of other files are
_NO_NAMES = {
    "begins with a quote": re.compile(r"[\"'`].*"),
    "begins with a bullet": _BULLET,
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
    if suffix in (".yaml", ".yml"):
        yaml = importlib.import_module("yaml")  # only here, because servers read no such files
        return _find_names(_parse_literal(text, yaml.safe_load, yaml.YAMLError))

    if suffix == ".json" or text.lstrip()[:1] in ("[", "{"):
        try:
            return _find_names(parse_json(text))
        # A text that is no JSON may be a dictionary of Python; other errors are of its names.
        except ValueError as error:
            if suffix == ".json" or not str(error).startswith("not JSON"):
                raise
        return _find_names(_parse_literal(text, ast.literal_eval, SyntaxError))

    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
    if not any(lines):
        raise ValueError("holds no name")
    return _names_of_lines([line for line in lines if line])


def _parse_literal(text: str, parse: Callable[[str], Any], error_type: type[Exception]) -> Any:
    """Return the values of *text*, which *parse* reads without running code; raises `ValueError`."""
    if len(text) > MAX_LITERAL_BYTES:
        raise ValueError(f"larger than {MAX_LITERAL_BYTES:,} bytes")
    try:
        return parse(text)
    except (MemoryError, RecursionError, TypeError, ValueError, error_type) as error:
        raise ValueError("neither JSON nor another list of names") from error


def _find_names(data: Any) -> tuple[str, ...]:
    """Find the names in *data*, or under one of `_KEYS` in it; several keys must give the same names."""
    if (names := _names_of_value(data)) is not None:
        return names

    names_by_key = {
        path: names
        for path, value in _find_keys(data)
        if (names := _names_of_value(value)) is not None
    }

    if len(set(names_by_key.values())) > 1:
        raise ValueError(f"holds several lists of names ({', '.join(names_by_key)})")
    if not names_by_key:
        raise ValueError('no list of names such as ["cat", "dog"]')
    return next(iter(names_by_key.values()))


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
        problem = f"its numbers are {min(by_number)} to {max(by_number)}, not 0 to {len(value) - 1}, each once"
        raise ValueError(f"{problem}, so the order of the logits is not certain")
    return tuple(by_number[number] for number in range(len(value)))


def _is_index(value: Any) -> bool:
    """Return whether *value* is a number of a class, or the text of one."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return is_number or (
        isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 10
    )


def _names_of_lines(lines: Sequence[str]) -> tuple[str, ...]:
    """Return the names in *lines*, without what all lines have beside them; raises `ValueError`.

    This is a comma at the end, then a bullet, then a number, then quotes. If quotes are around
    the whole line, only they are left out.
    """
    if len(lines) > 1 and all(line.endswith(",") for line in lines[:-1]):
        lines = [line.removesuffix(",").rstrip() for line in lines]

    if not all(map(_QUOTED.fullmatch, lines)):
        if all(map(_BULLET.match, lines)):
            lines = [_BULLET.sub("", line, count=1) for line in lines]
        without_index = _without_index(lines)
        lines = lines if without_index is None else without_index

    quoted = [_QUOTED.fullmatch(line) for line in lines]
    if all(quoted) and len({match[1] for match in quoted if match}) == 1:
        return tuple(match[2].strip() for match in quoted if match)

    _refuse_more_than_names(lines)
    return tuple(lines)


def _refuse_more_than_names(lines: Sequence[str]) -> None:
    """Raise `ValueError` if *lines* may be more than plain names: headings, columns or ids."""
    for position, line in enumerate(lines, 1):
        for problem, pattern in _NO_NAMES.items():
            if pattern.fullmatch(line) or (pattern is _BULLET and pattern.match(line)):
                raise ValueError(f"name {position} {problem}: {line[:40]!r}")

    for cell_end in _CELL_ENDS:
        counts = {len(cell_end.findall(line)) for line in lines}
        if len(counts) == 1 and counts != {0}:
            raise ValueError(f"a table of {counts.pop() + 1} columns")
    if len(lines) == 1 and "," in lines[0]:
        raise ValueError("all names stand in one line")

    if _begin_with_ids(lines):
        first_id = lines[0].split()[0]
        raise ValueError(f"each line begins with an id such as {first_id}; leave the ids out")


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


def _without_index(lines: Sequence[str]) -> tuple[str, ...] | None:
    """Return *lines* without the numbers with which all begin or end, if they count the lines from 0 or 1.

    The first line may be the heading of two columns. None if the lines have no numbers, or only
    some that may be parts of names. Raises `ValueError` for other numbers.
    """
    has_heading = len(lines) > 2 and _has_columns(lines[0])
    for side, pattern in (("begins", _LEADING), ("ends", _TRAILING)):
        matches = [pattern.fullmatch(line) for line in lines]
        numbered = [match for match in matches if match]
        names = tuple(match["name"] for match in numbered)
        numbers = [int(match["index"]) for match in numbered]

        # A list: all lines but a heading have a number, these count the lines, the rest are names.
        count_lines = numbers in (list(range(len(numbers))), list(range(1, len(numbers) + 1)))
        are_all_numbered = len(numbered) == len(lines) or (
            has_heading and matches[0] is None and len(numbered) + 1 == len(lines)
        )
        are_names = len(set(names)) == len(names) and not any(map(_has_columns, names))
        if are_all_numbered and count_lines and are_names:
            return names

        # `Boeing 747` ends with a number that is a part of the name.
        is_certain = side == "begins" or not any(match["between"] == " " for match in numbered)
        if numbered and are_all_numbered and is_certain:
            raise ValueError(
                f"each line {side} with a number, and these do not count the lines"
            )
        if len(numbered) > 1 and count_lines and is_certain:
            raise ValueError(
                f"{len(numbered)} of {len(lines)} lines {side.removesuffix('s')} with a number"
            )

    return None


def _has_columns(line: str) -> bool:
    return any(end.search(line) for end in _CELL_ENDS)
