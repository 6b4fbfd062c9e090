"""The report on a run, an export or a reproduced table: one self-contained HTML page without scripts.

The template escapes all text; control and text direction characters become U+FFFD.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"  # keeps a number and its unit on one line


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table; the first cell of each row is its header. A folded table is opened by its caption.

    The cells of a *matrix* are colored by their share of the row: the diagonal as right, others
    as wrong. `links` are the figures, by `Figure.name`, or the rows, by `names`, that cells
    (row, column) lead to, `pages` other pages, by their address from here.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    folded: bool = False
    matrix: bool = False
    links: Mapping[tuple[int, int], str] = field(default_factory=dict)
    pages: Mapping[tuple[int, int], str] = field(default_factory=dict)
    names: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A class: its name, a line of facts, the share that a bar shows, and sample photos, as `data:` URLs."""

    title: str
    text: str
    share: float | None = None
    images: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A chart or a photograph, as a `data:` URL, with its caption. `opens`: a click enlarges it.

    `name` is what links lead to, if any do.
    """

    image: str
    caption: str
    opens: bool = False
    name: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A heading with paragraphs, cards, figures and tables in this order; without content it is not shown.

    Where the window is wide, the figures are beside the tables of a section that is `divided`. A
    `folded` section is opened by its heading.
    """

    title: str
    text: Sequence[str] = ()
    cards: Sequence[Card] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    divided: bool = False
    folded: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class HtmlReport:
    """A title with warnings, paragraphs and key figures, then the sections.

    `headline` is the largest line; `bounds` are the low end of an interval, a value and the high
    end, from 0 to 1, drawn below. `folded` are texts below the paragraphs, by the captions that open them.
    """

    title: str
    headline: str = ""
    bounds: tuple[float, float, float] | None = None
    warnings: Sequence[str] = ()
    text: Sequence[str] = ()
    folded: Mapping[str, str] = field(default_factory=dict)
    tiles: Mapping[str, str] = field(default_factory=dict)
    sections: Sequence[Section] = ()


def render(report: HtmlReport) -> str:
    """Render *report* as an HTML page; equal reports give equal text."""
    return str(_template().render(report=report))


@cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415  # of the extra `train`

    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: sanitize(value) if isinstance(value, str) else value,
    )

    environment.globals["look"] = (files(__package__) / "look.css").read_text("utf-8")
    return environment.get_template("report.html")


def insert_names(template: str, *names: str, tag: str = "bdi") -> Any:
    """Insert *names* into *template* at its `{}`, as markup, and escape them; each keeps its direction."""
    from markupsafe import Markup  # noqa: PLC0415  # of the extra `train`

    marked = Markup(template.replace("{}", f"<{tag}>{{}}</{tag}>"))  # noqa: S704 # of this package
    return marked.format(*map(sanitize, names))  # which escapes the names


def sanitize(text: str) -> str:
    """Replace control and text direction characters by U+FFFD; markup stays markup."""
    if text.isprintable():  # saves the loop over the long `data:` URLs of photographs
        return text
    kept = "\n" + NO_BREAK_SPACE  # harmless, although `isprintable` is false for them
    clean = (c if c.isprintable() or c in kept else "\N{REPLACEMENT CHARACTER}" for c in text)
    return type(text)("".join(clean))


def percent(fraction: float, digits: int = 1) -> str:
    """Format a fraction as a percentage: 0.125 gives 12.5 %."""
    return f"{100 * fraction:.{digits}f}{NO_BREAK_SPACE}%"
