"""Browser pages: `/` classifies an image, `/docs` shows the API, `/errors` lists the error codes.

Each page is a single response with inline styles and scripts. It loads nothing from other hosts, and its
content security policy allows exactly these styles and scripts by hash. So the pages work offline, and text
from elsewhere (a file name, a label, a model card) cannot become a script.
"""

import base64
import hashlib
from importlib.resources import files

from fastapi import APIRouter, Response

FOLDER = files("sopdeploy_service.api") / "pages"
NONE = "'none'"
SHARED_SCRIPTS = ["dom.js", "key.js", "markdown.js"]

router = APIRouter(include_in_schema=False)


class Page:
    """A page with its HTML and response headers."""

    def __init__(self, name: str, styles: list[str], scripts: list[str]) -> None:
        """Insert the files *styles* and *scripts* into the HTML file *name*."""
        css, js = [_read(style) for style in styles], [_read(script) for script in scripts]
        logo = _read("mark.svg")
        icon = (
            f'<link rel="icon" href="data:image/svg+xml;base64,{base64.b64encode(logo.encode()).decode()}">'
        )
        html = _read(name).replace("<!-- mark -->", logo).replace("<!-- icon -->", icon)
        html = html.replace("<!-- styles -->", "\n".join(f"<style>{text}</style>" for text in css))
        self.html = html.replace("<!-- scripts -->", "\n".join(f"<script>{text}</script>" for text in js))
        policy = [
            f"default-src {NONE}",
            f"style-src {' '.join(map(_hash, css))}",
            f"script-src {' '.join(map(_hash, js)) or NONE}",
            "img-src blob: data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",  # no script can turn a string into markup
        ]
        self.headers = {
            "Content-Security-Policy": "; ".join(policy),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }


def _read(name: str) -> str:
    return (FOLDER / name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


INDEX = Page(
    "index.html",
    ["look.css", "index.css"],
    [*SHARED_SCRIPTS, "snippets.js", "answer.js", "about.js", "index.js"],
)
DOCS = Page("docs.html", ["look.css", "docs.css"], [*SHARED_SCRIPTS, "docs.js"])
ERRORS = Page("errors.html", ["look.css", "docs.css"], [])


@router.get("/")
async def index() -> Response:
    """Page that classifies an image."""
    return Response(INDEX.html, media_type="text/html", headers=INDEX.headers)


@router.get("/docs")
async def docs() -> Response:
    """Page that shows the API."""
    return Response(DOCS.html, media_type="text/html", headers=DOCS.headers)


@router.get("/errors")
async def errors() -> Response:
    """Page that explains the error codes; the `type` of a problem links to it."""
    return Response(ERRORS.html, media_type="text/html", headers=ERRORS.headers)
