"""Class names in a file: a JSON list of names as they are, or one name per line.

Lines that may be more than a name are refused, because the order of the logits and the names in answers
depend on them.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from sopdeploy.config import parse_json
from sopdeploy.errors import ConfigError
from sopdeploy.files import MAX_NAMES_BYTES, read_text
from sopdeploy.names import label_problem

_ADVICE = 'write one name per line in the order of the logits, or a JSON list such as ["cat", "dog"]'
_LEADING = re.compile(r"(?P<index>\d+)(?:\s*[,;:)=\t]\s*|\.(?!\d)\s*|\s+)(?P<name>\S.*)")
_TRAILING = re.compile(r"(?P<name>\S.*?)(?P<between>\s*[,;:=\t]\s*|\s+)(?P<index>\d+)")
_CELL_ENDS = (re.compile(r"\t"), re.compile(r"[,;](?!\s)"))  # of tables; `tench, Tinca tinca` is one name
_NO_NAMES = {  # what lines of other files are
    "begins with a quote": re.compile(r"[\"'`].*"),
    "begins with a bullet": re.compile(r"[-*+\u2022\u2013]\s+.*"),
    "may be a comment": re.compile(r"(#|//).*"),
    "has a bracket and no name": re.compile(r"[\[\](){}<>,;]+|.*[\[({]"),
    "has a key": re.compile(r"[\w-]+:(\s.*)?"),
    "ends with a comma": re.compile(r".*[,;]"),
}


def read_class_names(file: Path) -> tuple[str, ...]:
    """Read the class names in *file*, in the order of the logits; raises `ConfigError` if not certain."""
    try:
        text = read_text(file, MAX_NAMES_BYTES)
        names = _parse(text, is_json=file.suffix.lower() == ".json" or text.lstrip()[:1] in ("[", "{"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not in UTF-8; save it in this encoding", setting="labels") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{file} cannot be read ({reason}); {_ADVICE}", setting="labels") from error
    if problem := label_problem(names):
        raise ConfigError(f"{file}: {problem}; correct the file", setting="labels")
    return names


def _parse(text: str, *, is_json: bool) -> tuple[str, ...]:
    """Return the names in a JSON list or in lines; raises `ValueError`."""
    if is_json:
        names = parse_json(text)
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError('no list of names such as ["cat", "dog"]')
        return tuple(name.strip() for name in names)
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError("holds no name")
    _check_numbers(lines)
    for position, line in enumerate(lines, 1):
        for problem, pattern in _NO_NAMES.items():
            if pattern.fullmatch(line):
                raise ValueError(f"name {position} {problem}: {line[:40]!r}")
    for cell_end in _CELL_ENDS:
        counts = {len(cell_end.findall(line)) for line in lines}
        if len(counts) == 1 and counts != {0}:
            raise ValueError(f"a table of {counts.pop() + 1} columns")
    if len(lines) == 1 and "," in lines[0]:
        raise ValueError("all names stand in one line")
    words = [line.split(maxsplit=1) for line in lines]
    shapes = {re.sub(r"[^\W\d_]", "a", re.sub(r"\d", "9", first)) for first, *_ in words}
    has_ids = len(shapes) == 1 and "9" in min(shapes) and all(len(parts) == 2 for parts in words)
    if has_ids and 1 < len(lines) == len({first for first, _ in words}):
        raise ValueError(f"each line begins with an id such as {words[0][0]}; leave the ids out")
    return tuple(lines)


def _check_numbers(lines: Sequence[str]) -> None:
    """Raise `ValueError` if *lines* begin or end with numbers that may not belong to the names."""
    for side, pattern in (("begin", _LEADING), ("end", _TRAILING)):
        found = [match for line in lines if (match := pattern.fullmatch(line))]
        numbers = [int(match["index"]) for match in found]
        counts = numbers in (list(range(len(found))), list(range(1, len(found) + 1)))
        is_complete, differ = len(found) == len(lines), len({match["name"] for match in found}) == len(found)
        if side == "end" and any(match["between"] == " " for match in found):
            is_problem = is_complete and counts and differ  # unlike `Boeing 747`, or `grade 1` and `grade 2`
        else:
            is_problem = is_complete or (counts and len(found) > 1)
        if is_problem:
            raise ValueError(
                f"{len(found)} of {len(lines)} lines {side} with a number; leave the numbers out"
            )
