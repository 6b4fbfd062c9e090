"""Browser pages: `/` classifies an image, `/docs` shows the API, `/errors` lists the error codes.

Each page is a single response with inline styles and scripts. It loads nothing from other hosts, and its
content security policy allows exactly these styles and scripts by hash. So the pages work offline, and text
from elsewhere (a file name, a label, a model card) cannot become a script.
"""

import base64
import hashlib
from importlib.resources import files

from fastapi import APIRouter, Response

_FOLDER = files("sopdeploy_service.api") / "pages"
_NONE = "'none'"
SHARED_SCRIPTS = ["dom.js", "key.js", "markdown.js"]

router = APIRouter(include_in_schema=False)


class Page:
    """A page with its HTML and response headers."""

    def __init__(self, name: str, styles: list[str], scripts: list[str]) -> None:
        """Insert the files *styles* and *scripts* into the HTML file *name*."""
        html, logo = (_FOLDER / name).read_text("utf-8"), (_FOLDER / "mark.svg").read_text("utf-8")
        encoded = base64.b64encode(logo.encode()).decode()
        icon = f'<link rel="icon" href="data:image/svg+xml;base64,{encoded}">'
        html = html.replace("<!-- mark -->", logo).replace("<!-- icon -->", icon)
        hashes = {}
        for element, tag, names in (("styles", "style", styles), ("scripts", "script", scripts)):
            texts = [(_FOLDER / file).read_text("utf-8") for file in names]
            inline = "\n".join(f"<{tag}>{text}</{tag}>" for text in texts)
            html = html.replace(f"<!-- {element} -->", inline)
            digests = (hashlib.sha256(text.encode()).digest() for text in texts)
            hashes[tag] = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
        self.html = html
        policy = [
            f"default-src {_NONE}",
            f"style-src {hashes['style']}",
            f"script-src {hashes['script'] or _NONE}",
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

    async def respond(self) -> Response:
        """Return the page."""
        return Response(self.html, media_type="text/html", headers=self.headers)


INDEX = Page(
    "index.html",
    ["look.css", "index.css"],
    [*SHARED_SCRIPTS, "snippets.js", "answer.js", "about.js", "index.js"],
)
DOCS = Page("docs.html", ["look.css", "docs.css"], [*SHARED_SCRIPTS, "docs.js"])
_ERRORS = Page("errors.html", ["look.css", "docs.css"], [])

for path, page in {"/": INDEX, "/docs": DOCS, "/errors": _ERRORS}.items():
    router.add_api_route(path, page.respond)
