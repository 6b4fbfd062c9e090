"""Build SVG elements with escaped text and attributes and closed tags."""

from markupsafe import Markup

from sopdeploy.html.templates import sanitize


def element(name: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """Build the element *name*; children that are not `Markup` are escaped.

    In attribute names `_` stands for `-` and a trailing `_` is dropped (`class_`). None omits an attribute;
    numbers are rounded to two decimals.
    """
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), sanitize(_coordinate(value)))
        for key, value in attributes.items()
        if value is not None
    )
    body = Markup("").join(sanitize(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(name, written, body)


def text(x: float, y: float, content: str, class_: str | None = "small", anchor: str | None = None) -> Markup:
    """Build text at the baseline (x, y); *anchor* is `start`, `middle` or `end`."""
    return element("text", content, x=x, y=y, class_=class_, text_anchor=anchor)


def svg(id: str, title: str, description: str, size: tuple[float, float], *shapes: str) -> Markup:
    """Build an `<svg>` of *size* (width, height) with texts for screen readers."""
    return element(
        "svg",
        element("title", title, id=f"{id}-title"),
        element("desc", description, id=f"{id}-desc"),
        *shapes,
        viewBox=f"0 0 {_coordinate(size[0])} {_coordinate(size[1])}",
        role="img",
        aria_labelledby=f"{id}-title {id}-desc",
    )


def _coordinate(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
