"""A whole page: one file that loads nothing, light or dark, on paper or a telephone."""

from importlib.resources import files

from sopdeploy.html.markup import Html, tag

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # pictures lie in the page itself


def document(title: str, *children: Html) -> str:
    """Return the page called *title* with *children* in it."""
    style = files(__package__).joinpath("style.css").read_text(encoding="utf-8")
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
