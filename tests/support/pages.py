"""A parser that checks HTML pages of the project."""

import base64
from html.parser import HTMLParser

VOID = {"br", "img", "meta"}
# None of these loads, runs or submits anything
ALLOWED = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "header",
        "section",
        "h1",
        "h2",
        "p",
        "dl",
    ),
    *(
        "div",
        "dt",
        "dd",
        "figure",
        "img",
        "figcaption",
        "details",
        "summary",
        "table",
        "caption",
        "thead",
    ),
    *("tbody", "tr", "th", "td", "bdi", "code", "ul", "li"),
    *("svg", "g", "rect", "span", "small", "i"),
}


class Reader(HTMLParser):
    """Parse a page, check that tags are closed in order, and collect tags and texts."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.met: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[list[str], str]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.met.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(self.met[-1])

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop()[0] == name

    def handle_data(self, data: str) -> None:
        classes = [attributes.get("class") or name for name, attributes in self.open]
        self.texts.append((classes, data))

    def text_in(self, kind: str) -> list[str]:
        return [text for classes, text in self.texts if kind in classes]


def charts(page: str) -> dict[str, str]:
    """Decode the SVG images of *page*, by caption."""
    images = [found for name, found in Reader(page).met if name == "img"]
    encoded = {found["alt"] or "": (found["src"] or "").partition(",") for found in images}
    return {
        caption: base64.b64decode(content).decode("utf-8")
        for caption, (kind, _, content) in encoded.items()
        if "svg" in kind
    }
