"""A renderer for the subset of Helm templates that the chart uses, to validate it without helm.

Supports `{{ .Values.x }}` with `quote`, `toYaml ... | nindent N`, `if`, `if not`, `else`, `range $k, $v :=`
and `end`; raises an error for anything else. test_deploy.py compares it with helm where helm is installed.
"""

import json
import re
from typing import Any

import yaml

TAG = re.compile(r"(\s*)\{\{(-?)\s*(.*?)\s*(-?)\}\}")
LOOP = re.compile(r"range \$(\w+), \$(\w+) := (\.[\w.]+)$")


def look_up(path: str, scope: dict[str, Any]) -> Any:
    """Look up `.Values.a.b` or `$name`; raise an error for a missing key."""
    if path.startswith("$"):
        return scope[path]
    if not path.startswith("."):
        raise ValueError(f"not supported: {path}")
    found: Any = scope
    for part in path[1:].split("."):
        found = found[part]
    return found


def evaluate(expression: str, scope: dict[str, Any]) -> str:
    """Evaluate *expression* with its pipes to text."""
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
            raise ValueError(f"not supported: {pipe}")
    return text


def tokens(template: str) -> list[tuple[str, str]]:
    """Split *template* into `text` and `tag` tokens; `{{-` removes the white space before it."""
    found: list[tuple[str, str]] = []
    place = 0
    for match in TAG.finditer(template):
        space, left, inner, right = match.groups()
        if right:
            raise ValueError("not supported: -}}")
        found += [("text", template[place : match.start()] + ("" if left else space)), ("tag", inner)]
        place = match.end()
    return [*found, ("text", template[place:])]


def block(pieces: list[tuple[str, str]], scope: dict[str, Any], *, shown: bool) -> str:
    """Render *pieces* up to the `end` of this block and remove them from the list."""
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
            printed += conditional(pieces, inner.removeprefix("if "), scope, shown=shown)
        elif loop := LOOP.match(inner):
            printed += loop_over(pieces, loop, scope, shown=shown)
        elif shown:
            printed += evaluate(inner, scope)
    return printed


def conditional(pieces: list[tuple[str, str]], condition: str, scope: dict[str, Any], *, shown: bool) -> str:
    """Render the branch that *condition* selects."""
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


def loop_over(
    pieces: list[tuple[str, str]], loop: re.Match[str], scope: dict[str, Any], *, shown: bool
) -> str:
    """Render the block of a `range` for each entry."""
    name, value, path = loop.groups()
    printed = ""
    copies = list(pieces)
    block(pieces, scope, shown=False)
    for key, entry in sorted(look_up(path, scope).items()):
        printed += block(list(copies), scope | {f"${name}": key, f"${value}": entry}, shown=shown)
    return printed


def render(template: str, values: dict[str, Any], release: str) -> str:
    """Render *template* for *values* like Helm."""
    scope = {"Values": values, "Release": {"Name": release}}
    return block(tokens(template), scope, shown=True)
