"""As much of Helm's templates as the chart uses, so that it can be held against schemas where no helm is.

`{{ .Values.x }}` with `quote`, `toYaml ... | nindent N`, `if`, `if not`, `else`, `range $k, $v :=`, `end`;
anything else is an error, and so keeps the chart simple. `helm template` itself is asked where it is
installed.
"""

import json
import re
from typing import Any

import yaml

TAG = re.compile(r"(\s*)\{\{(-?)\s*(.*?)\s*(-?)\}\}")
LOOP = re.compile(r"range \$(\w+), \$(\w+) := (\.[\w.]+)$")


def look_up(path: str, scope: dict[str, Any]) -> Any:
    """Return the value of `.Values.a.b` or `$name`; a key that is missing is an error."""
    if path.startswith("$"):
        return scope[path]
    if not path.startswith("."):
        raise ValueError(f"not understood: {path}")
    found: Any = scope
    for part in path[1:].split("."):
        found = found[part]
    return found


def evaluate(expression: str, scope: dict[str, Any]) -> str:
    """Return what *expression* prints."""
    head, *pipes = [part.strip() for part in expression.split("|")]
    as_yaml = head.removeprefix("toYaml ") if head.startswith("toYaml ") else None
    value = look_up(as_yaml or head, scope)
    text = yaml.safe_dump(value, default_flow_style=not value).strip() if as_yaml else str(value)
    for pipe in pipes:
        if pipe == "quote":
            text = json.dumps(text)
        elif pipe.startswith("nindent "):
            indent = " " * int(pipe.removeprefix("nindent "))
            text = "\n" + "\n".join(indent + line for line in text.splitlines())
        else:
            raise ValueError(f"not understood: {pipe}")
    return text


def tokens(template: str) -> list[tuple[str, str]]:
    """Return the pieces of *template*: `text` and `tag`, the white space taken away where `-` says so."""
    found: list[tuple[str, str]] = []
    place = 0
    for match in TAG.finditer(template):
        space, left, inner, right = match.groups()
        if right:
            raise ValueError("not understood: -}}")
        found += [("text", template[place : match.start()] + ("" if left else space)), ("tag", inner)]
        place = match.end()
    return [*found, ("text", template[place:])]


def block(pieces: list[tuple[str, str]], scope: dict[str, Any], *, shown: bool) -> str:
    """Print *pieces* up to the `end` of this block, taking them off the list."""
    printed = ""
    while pieces:
        kind, inner = pieces.pop(0)
        if kind == "text":
            printed += inner if shown else ""
        elif inner == "end":
            return printed
        elif inner == "else":
            raise ValueError("`else` without `if`")
        elif inner.startswith("if "):
            printed += choice(pieces, inner.removeprefix("if "), scope, shown=shown)
        elif loop := LOOP.match(inner):
            printed += repeated(pieces, loop, scope, shown=shown)
        elif shown:
            printed += evaluate(inner, scope)
    return printed


def choice(pieces: list[tuple[str, str]], condition: str, scope: dict[str, Any], *, shown: bool) -> str:
    """Print the one of two branches that *condition* chooses."""
    holds = bool(look_up(condition.removeprefix("not "), scope)) != condition.startswith("not ")
    depth, middle = 0, None
    for place, (kind, inner) in enumerate(pieces):
        opens = kind == "tag" and inner.startswith(("if ", "range "))
        depth += opens - (kind == "tag" and inner == "end")
        if depth < 0:
            break
        if depth == 0 and (kind, inner) == ("tag", "else"):
            middle = place
    if middle is None:
        return block(pieces, scope, shown=shown and holds)
    pieces[middle] = ("tag", "end")
    first = block(pieces, scope, shown=shown and holds)
    return first + block(pieces, scope, shown=shown and not holds)


def repeated(
    pieces: list[tuple[str, str]], loop: re.Match[str], scope: dict[str, Any], *, shown: bool
) -> str:
    """Print the block of a `range` once for each entry."""
    name, value, path = loop.groups()
    printed = ""
    copies = list(pieces)
    block(pieces, scope, shown=False)
    for key, entry in sorted(look_up(path, scope).items()):
        printed += block(list(copies), scope | {f"${name}": key, f"${value}": entry}, shown=shown)
    return printed


def render(template: str, values: dict[str, Any], release: str) -> str:
    """Return *template* as Helm prints it for *values*."""
    scope = {"Values": values, "Release": {"Name": release}}
    return block(tokens(template), scope, shown=True)
