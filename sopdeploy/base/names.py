"""The rules for names: of projects, classes and links. What reads names and what writes them calls these."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, Any

import pydantic

from sopdeploy.base.config import parse_json, shown

MAX_CLASSES = 100_000
MAX_CLASS_NAME = 1_000  # characters
MAX_LINK = 4_096  # characters of a path in a link
# Files have up to 50 more characters
_PROJECT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
# Before the id of a bundle, which ends its name
_BUNDLE_END = re.compile(r"-(?=[0-9a-f]{12}$)")
# The ends of the Unicode names of characters that are letters or symbols by category, but have
# no glyph.
_BLANKS = ("FILLER", "BLANK", "NULL NOTEHEAD")


def project_problem(name: str) -> str | None:
    """Say why *name* cannot be that of a project; None if it can."""
    if _PROJECT.fullmatch(name) is None:
        return "use at most 200 letters, digits, `.`, `_` and `-`, the first not `.`"
    return None


def is_bundle_name(name: str) -> bool:
    """Tell whether *name* ends as those of bundles do, `<project>-<id>`, so that it names one bundle only."""
    return _BUNDLE_END.search(name) is not None


def without_bundle_end(name: str) -> str:
    """Replace the `-` that makes *name* that of a bundle by `.`; other names stay as they are."""
    return _BUNDLE_END.sub(".", name)


def is_visible(character: str) -> bool:
    """Tell whether *character* shows something on its own: no space, mark, control or blank letter."""
    blank = unicodedata.name(character, "").endswith(_BLANKS)
    return unicodedata.category(character)[0] in "LNPS" and not blank


def as_utf8(text: object) -> str:
    """Return *text*, such as a path, for a document in UTF-8; bytes that are not UTF-8 become `?`."""
    return str(text).encode("utf-8", "replace").decode()


def class_problem(name: str) -> str | None:
    """Say why *name* cannot be that of a class; None if it can."""
    if len(name) > MAX_CLASS_NAME:
        return f"its name has more than {MAX_CLASS_NAME} characters"
    if any(unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"} for character in name):
        return "its name has control characters or is not valid Unicode"
    if not any(map(is_visible, name)):
        return "its name is empty or invisible"
    return None


def label_problem(labels: Sequence[str]) -> str | None:
    """Describe why *labels* cannot be the classes; None if they can.

    They are too many, or one cannot name a class, of which the first is described, or one occurs
    twice.
    """
    if len(labels) > MAX_CLASSES:
        return f"{len(labels)} classes, more than {MAX_CLASSES}, the limit"

    for label in labels:
        if problem := class_problem(label):
            return f"class {shown(label)}: {problem}"
    for label, other in pairwise(sorted(labels)):
        if label == other:
            numbers = [number for number, each in enumerate(labels) if each == label][:2]
            first, second = (shown(f"{label} {number}") for number in numbers)
            return (
                f"class {shown(label)}: its name occurs twice, as number {numbers[0]} and {numbers[1]}; name "
                f"them apart, as {first} and {second}"
            )
    return None


def link_problem(path: str) -> str | None:
    """Say why no link of `promote` can lead to *path*; None if one can."""
    if not 1 <= len(path) <= MAX_LINK or any(
        unicodedata.category(each) == "Cc" for each in path
    ):
        return f"not a path of 1 to {MAX_LINK} characters without control characters"
    return None


def _without_problem(find_problem: Callable[[Any], str | None]) -> pydantic.AfterValidator:
    """Build a validator that raises the problem which *find_problem* describes, if any."""

    def check(value: Any) -> Any:
        if problem := find_problem(value):
            raise ValueError(problem)
        return value

    return pydantic.AfterValidator(check)


def read_labels(raw: bytes) -> tuple[str, ...]:
    """Read class names from the JSON list *raw*; raises `ValueError` that says what is wrong."""
    try:
        return _LABELS.validate_python(parse_json(raw))
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]
        is_label_problem = problem["type"] == "value_error"  # others are of pydantic
        reason = problem["ctx"]["error"] if is_label_problem else "not a list of class names"
        raise ValueError(reason) from error
    except ValueError as error:
        raise ValueError("not a list of class names") from error


ProjectName = Annotated[str, _without_problem(project_problem)]
LinkPath = Annotated[str, _without_problem(link_problem)]
DISTINCT_NAMES = _without_problem(label_problem)
Labels = Annotated[
    tuple[str, ...],
    pydantic.Field(min_length=1, max_length=MAX_CLASSES),
    pydantic.FailFast(),
    DISTINCT_NAMES,
]
_LABELS: pydantic.TypeAdapter[tuple[str, ...]] = pydantic.TypeAdapter(Labels)
