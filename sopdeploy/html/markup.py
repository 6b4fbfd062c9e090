"""HTML and SVG as values: every string is escaped unless it is markup, and every tag is closed."""

import html
from collections.abc import Iterable, Sequence
from importlib.resources import files

from markupsafe import Markup

VOID = frozenset({"br", "img", "meta"})
KEPT = frozenset("\n\N{NO-BREAK SPACE}")  # not printable by Python's reckoning, and harmless
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


Html = Markup


def tag(name: str, /, *children: str, **attributes: str | float | None) -> Html:
    """Return the element *name*; the attribute `aria_label` is aria-label, `class_` class, None left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{clean(amount(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[str]) -> Html:
    """Return *children* one after another; those that are no markup are escaped."""
    return Html("".join(child if isinstance(child, Html) else clean(child) for child in children))


def clean(text: str) -> str:
    """Return *text* escaped, without characters that would steer how others are shown."""
    return html.escape("".join(c if c.isprintable() or c in KEPT else REPLACEMENT for c in text))


def amount(value: str | float) -> str:
    """Return a coordinate with two decimals at most; text stays as it is."""
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def table(
    caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str | None = None
) -> Html:
    """Return a table whose first column names its rows; *kind* may be `figures` or `hashes`."""
    head = tag("tr", *(tag("th", text, scope="col") for text in heads))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption),
            tag("thead", head),
            tag("tbody", *body),
            class_=kind,
        ),
        class_="scroll",
    )


def section(title: str, name: str, *children: str) -> Html:
    """Return a section of the page with its heading."""
    return tag("section", tag("h2", title, id=name), *children, aria_labelledby=name)


def paragraph(*children: str) -> Html:
    """Return a paragraph."""
    return tag("p", *children)


def folded(title: str, *children: str) -> Html:
    """Return what opens when its title is chosen; needs no script."""
    return tag("details", tag("summary", title), *children)


def picture(name: str, title: str, description: str, size: tuple[float, float], *shapes: str) -> Html:
    """Return an inline SVG of *size* units called *name*, with words for those who do not see it."""
    width, height = size
    return tag(
        "svg",
        tag("title", title, id=f"{name}-title"),
        tag("desc", description, id=f"{name}-desc"),
        *shapes,
        viewBox=f"0 0 {amount(width)} {amount(height)}",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
    )


def figure(drawn: Html, caption: str) -> Html:
    """Return a picture with what is to be seen on it."""
    return tag("figure", drawn, tag("figcaption", caption))


def words(x: float, y: float, text: str, kind: str | None = None, anchor: str | None = None) -> Html:
    """Return a line of text within a picture, its baseline at (x, y)."""
    return tag("text", text, x=x, y=y, class_=kind, text_anchor=anchor)


def shortened(text: str, longest: int) -> str:
    """Return *text* with its middle left out where it is longer than *longest* characters."""
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - (longest - 1 - head) :]}"


SPACE = "\N{NO-BREAK SPACE}"  # a number and its unit stay on one line
STEPS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(count: float) -> str:
    """Return *count* with three digits and a unit: 11.7 M."""
    for step, unit in STEPS:
        if count >= step:
            return f"{count / step:.3g}{SPACE}{unit}"
    return f"{count:g}"


def size(count: int) -> str:
    """Return a number of bytes: 44.7 MB."""
    return f"{short(count)}B" if count >= 1000 else f"{count}{SPACE}bytes"


def percent(share: float, digits: int = 1) -> str:
    """Return *share* in percent: 12.5 %."""
    return f"{100 * share:.{digits}f}{SPACE}%"


def less(before: float, after: float) -> str:
    """Return how much less *after* is: 12.5 % less, or the same."""
    if after >= before:
        return "the same"
    return f"{percent(1 - after / before)} less"


def shape(sizes: tuple[int, ...]) -> str:
    """Return the shape of one image's tensor: 64 x 56 x 56."""
    return "\N{MULTIPLICATION SIGN}".join(map(str, sizes))


POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # pictures lie in the page itself


def document(title: str, *children: Html) -> str:
    """Return the page called *title* with *children* in it."""
    style = files(__package__).joinpath("templates/style.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(style)),
    )
    body = tag("body", tag("main", *children))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"
