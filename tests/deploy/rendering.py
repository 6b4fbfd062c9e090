"""Render the chart's Helm templates with Jinja, to validate them without helm.

Supports `.Values.x`, `quote`, `toYaml ... | nindent N`, `if`, `if not`, `else`, `range $k, $v :=` and `end`;
anything else is an error. test_deploy.py compares it with Helm where its library is installed.
"""

import json
import re
from typing import Any

import jinja2
import yaml

TAG = re.compile(r"(\s*)\{\{(-?)\s*(.*?)\s*\}\}")


def to_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=not value).strip()


def nindent(text: str, size: int) -> str:
    return "\n" + "\n".join(" " * size + line for line in text.splitlines())


def to_jinja(template: str) -> str:
    """Translate a Helm template; `{{-` removes the white space before it."""
    opened: list[str] = []

    def translate(match: re.Match[str]) -> str:
        space, strips, inner = match.groups()
        word, _, rest = inner.partition(" ")
        if word in {"if", "range"}:
            opened.append("endif" if word == "if" else "endfor")
            rest = re.sub(r"^\$(\w+), \$(\w+) := (\S+)$", r"\1, \2 in \3 | dictsort", rest)
            tag = f"{{% {'if' if word == 'if' else 'for'} {rest} %}}"
        elif inner in {"else", "end"}:
            tag = f"{{% {opened.pop() if inner == 'end' else inner} %}}"
        else:
            inner = re.sub(r"^toYaml (\S+)", r"\1 | toYaml", inner)
            inner = re.sub(r"nindent (\d+)", r"nindent(\1)", inner)
            tag = f"{{{{ {inner} }}}}"
        return ("" if strips else space) + re.sub(r"\$(?=\w)|(?<!\w)\.(?=[VR])", "", tag)

    return TAG.sub(translate, template)


def render(template: str, values: dict[str, Any], release: str) -> str:
    """Render *template* for *values* like Helm."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)  # noqa: S701
    environment.filters |= {
        "toYaml": to_yaml,
        "nindent": nindent,
        "quote": lambda value: json.dumps(str(value)),
    }
    environment.getattr = environment.getitem  # type: ignore[method-assign] # `keys` is a value, not a method
    return environment.from_string(to_jinja(template)).render(
        Values=values, Release={"Name": release, "Namespace": "default"}
    )
