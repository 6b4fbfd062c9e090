"""Render self-contained HTML pages from jinja2 templates.

Every package that writes pages has a folder `templates/`. Its pages extend `base.html` and import
`macros.html`, both from `sopdeploy/html/templates/`. Autoescaping is on: only values of type
`markupsafe.Markup`, such as the charts of `sopdeploy.html.charts`, are inserted as markup.
"""

from functools import cache

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sopdeploy.html.report import percent, sanitize

_NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"  # keeps a number and its unit on one line
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def render_template(package: str, name: str, **context: object) -> str:
    """Render the template *name* of *package* and return the page.

    Equal arguments give equal text. Raises `jinja2.UndefinedError` if *context* lacks a name.
    """
    return create_environment(package).get_template(name).render(context)


@cache
def create_environment(package: str) -> Environment:
    """Return the environment for the templates of *package*; it escapes all text."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader(__package__)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: (
            sanitize(value) if isinstance(value, str) and not isinstance(value, Markup) else value
        ),
    )
    for function in (percent, short_number, file_size, reduction, dimensions):
        environment.filters[function.__name__] = function
    environment.filters["number"] = format  # {{ 0.5|number(".2f") }}
    return environment


def short_number(value: float) -> str:
    """Format *value* with three digits and an SI prefix: 11.7 M."""
    for step, prefix in _PREFIXES:
        if value >= step:
            return f"{value / step:.3g}{_NO_BREAK_SPACE}{prefix}"
    return f"{value:g}"


def file_size(count: int) -> str:
    """Format a number of bytes: 44.7 MB."""
    return f"{short_number(count)}B" if count >= 1000 else f"{count}{_NO_BREAK_SPACE}bytes"


def reduction(before: float, after: float) -> str:
    """Format how much smaller *after* is than *before*: "12.5 % less" or "the same"."""
    return f"{percent(1 - after / before)} less" if after < before else "the same"


def dimensions(shape: tuple[int, ...]) -> str:
    """Format the shape of a tensor: 64 x 56 x 56, with multiplication signs."""
    return "\N{MULTIPLICATION SIGN}".join(map(str, shape))


def shorten_middle(text: str, longest: int) -> str:
    """Replace the middle of *text* by an ellipsis if it exceeds *longest* characters."""
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - (longest - 1 - head) :]}"
