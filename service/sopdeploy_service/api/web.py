"""What a person opens in a browser: `/` takes a picture, `/docs` shows the API, `/errors` its codes.

Each page is one answer: its styles and scripts stand in it, nothing is loaded from another host, and the
content security policy allows exactly these, by hash. So the pages work without a network, and text that came
from elsewhere (a file name, a label, a model card) cannot become a script.
"""

import base64
import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Response

from sopdeploy.bundle.folder import Bundle
from sopdeploy.config import StrictModel
from sopdeploy_service.inference.results import GATES

FOLDER = files("sopdeploy_service.api") / "pages"
NOTHING = "'none'"

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True, slots=True)
class Page:
    """A page as it is sent: its HTML and its headers."""

    html: str
    headers: dict[str, str]

    def response(self) -> Response:
        """Return the answer that shows this page."""
        return Response(self.html, media_type="text/html", headers=self.headers)


def assemble(name: str, styles: list[str], scripts: list[str]) -> Page:
    """Return the page of the file *name* with the texts of *styles* and *scripts* in it."""
    css, js = [read(style) for style in styles], [read(script) for script in scripts]
    mark = read("mark.svg")
    icon = f'<link rel="icon" href="data:image/svg+xml;base64,{base64.b64encode(mark.encode()).decode()}">'
    html = read(name).replace("<!-- mark -->", mark).replace("<!-- icon -->", icon)
    html = html.replace("<!-- styles -->", "\n".join(f"<style>{text}</style>" for text in css))
    html = html.replace("<!-- scripts -->", "\n".join(f"<script>{text}</script>" for text in js))
    policy = [
        f"default-src {NOTHING}",
        f"style-src {' '.join(map(source, css))}",
        f"script-src {' '.join(map(source, js)) or NOTHING}",
        "img-src blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # no string becomes markup, whatever a later script tries
    ]
    return Page(
        html,
        {
            "Content-Security-Policy": "; ".join(policy),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        },
    )


def read(name: str) -> str:
    """Return the text of the file *name* of the pages."""
    return (FOLDER / name).read_text("utf-8")


def source(text: str) -> str:
    """Return how a policy names the inline *text*."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


INDEX = assemble(
    "index.html",
    ["look.css", "index.css"],
    ["dom.js", "key.js", "markdown.js", "snippets.js", "answer.js", "about.js", "index.js"],
)
DOCS = assemble("docs.html", ["look.css", "docs.css"], ["dom.js", "key.js", "markdown.js", "docs.js"])

ERRORS = assemble("errors.html", ["look.css", "docs.css"], [])


@router.get("/")
async def index() -> Response:
    """Give the page that takes a picture."""
    return INDEX.response()


@router.get("/docs")
async def docs() -> Response:
    """Give the page that shows the API."""
    return DOCS.response()


@router.get("/errors")
async def errors() -> Response:
    """Give the page that explains the codes of errors; a problem's `type` leads here."""
    return ERRORS.response()


README = "README.md"


class Proved(StrictModel):
    """The certificate in short: what was taken off, what was kept, and the roots of the graphs."""

    detached: tuple[str, ...]
    removed: int
    bytes_removed: int
    kept: int
    root: str
    onnx_root: str
    operations: int
    images: int
    largest_difference: float


class Card(StrictModel):
    """The model card as Markdown; `experts` is how many a gate chooses among, 0 without a gate."""

    bundle: str
    text: str
    certificate: Proved | None
    experts: int


def read_card(bundle: Bundle) -> Card:
    """Return the card of *bundle*; its text is empty where the bundle has no README.md."""
    readme = bundle.path / README
    text = readme.read_text("utf-8", "replace") if README in bundle.manifest.files else ""
    found = json.loads((bundle.path / "certificate.json").read_bytes())
    sizes = [output.shape[-1] for output in bundle.manifest.outputs if output.name == GATES]
    return Card(bundle=bundle.name, text=text, certificate=proved(found), experts=next(iter(sizes), 0) or 0)


def proved(certificate: Any) -> Proved | None:
    """Return *certificate*, parsed JSON, in short; None where it has not the shape of one."""
    try:
        roots = certificate["roots"]
        return Proved(
            detached=certificate["detached"],
            removed=len(certificate["removed"]),
            bytes_removed=sum(entry["bytes"] for entry in certificate["removed"]),
            kept=len(certificate["kept"]),
            root=roots["any_batch"],
            onnx_root=roots["onnx"],
            operations=roots["operations"],
            images=certificate["images"],
            largest_difference=certificate["largest_difference"],
        )
    except (KeyError, TypeError, ValueError):
        return None
