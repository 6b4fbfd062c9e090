"""Browser pages: `/` classifies an image, `/docs` is the API in Swagger UI, `/errors` lists the error codes.

No page loads anything from other hosts. The content security policy allows inline styles and
scripts by hash; `/docs` also loads the files of `fastapi-offline` from this server. So the
pages work offline, and text from elsewhere (a file name, a label, a model card) cannot become a
script.
"""

import asyncio
import base64
import hashlib
import math
import os
import re
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import RedirectResponse
from starlette.types import Receive, Scope, Send

from sopdeploy.base.config import StrictModel
from sopdeploy.base.files import read_file
from sopdeploy.data.photos.files import data_folder, list_images, naming_all_undecodable
from sopdeploy.errors import DataError
from sopdeploy.images.limits import FORMATS, MAX_BYTES, describe_formats, missing_extra
from sopdeploy.images.signatures import HEAD_BYTES, SUFFIXES, media_type_of
from sopdeploy_service.api.admission import json_response
from sopdeploy_service.http.middleware import PAGE_FILES, RequestContext

_FOLDER = files("sopdeploy_service.api") / "pages"
_SHARED = files("sopdeploy.html")  # the style sheet that reports have, too
_LOGO = (_FOLDER / "mark.svg").read_text("utf-8")
_ICON = f"data:image/svg+xml;base64,{base64.b64encode(_LOGO.encode()).decode()}"
MAX_EXAMPLES = 8
PIECE_BYTES = 1 << 16  # of a response, for one client at a time
EXAMPLE_SECONDS = 10.0  # for reading one; the disk may hang
# Headers of a file of the owner, which never runs in this origin
_INERT = {
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
TRUSTED_TYPES = "require-trusted-types-for 'script'"  # no script can turn a string into markup

router = APIRouter(include_in_schema=False)


class Page:
    """A page with its HTML and response headers."""

    def __init__(
        self,
        html: str,
        scripts: list[str],
        *,
        assets: tuple[str, ...] = (),
        policy: str = "",
        folder: Traversable = _FOLDER,
    ) -> None:
        """Replace comments in *html* by head, logo, icon and styles; add the files *scripts* to its end.

        The security policy allows these styles and scripts, those of the sources *assets*, and
        what the rules *policy* say. Files that *folder* does not have are those of this
        package, or shared with reports.
        """
        # Fill in what all pages share.
        head = _read("head.html").rstrip()
        html = re.sub(
            "<!-- head: (.*) -->", lambda match: head.replace("<!-- title -->", match[1]), html
        )

        html = html.replace("<!-- mark -->", _LOGO)
        html = html.replace("<!-- icon -->", f'<link rel="icon" href="{_ICON}">')
        html = re.sub(
            r"<!-- (\w+\.css) -->",
            lambda match: f"<style>{_read(match[1], folder)}</style>",
            html,
        )

        # The scripts of the page, and the suffixes of the formats that can be decoded.
        inline = "\n".join(f"<script>{_read(name, folder)}</script>" for name in scripts)
        inline = inline.replace("{suffixes}", "|".join(map(re.escape, SUFFIXES)))
        self.html = html.replace("</body>", f"{inline}</body>")

        # Allow only what the page contains: an injected script would not run.
        rules = [
            "default-src 'none'",
            f"style-src {_policy_sources('style', self.html, assets)}",
            f"script-src {_policy_sources('script', self.html, assets)}",
            "img-src blob: data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            policy,
        ]

        self.headers = {
            "Content-Security-Policy": "; ".join(filter(None, rules)),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }


def _read(name: str, folder: Traversable = _FOLDER) -> str:
    """Read the file *name* of *folder* or, if it is not there, of this package or of reports."""
    for parent in (folder, _FOLDER):
        if (parent / name).is_file():
            return (parent / name).read_text("utf-8")
    return (_SHARED / name).read_text("utf-8")


def _policy_sources(tag: str, html: str, assets: tuple[str, ...]) -> str:
    """Return the hashes of the inline elements *tag* in *html*, and *assets*, for the security policy."""
    texts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    hashes = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    return " ".join([*hashes, *assets]) or "'none'"


async def _show_page(page: Page, request: Request) -> Response:
    """Return *page* with the formats that the server accepts, or redirect from `root_path` to its `/`."""
    # The path is `/` with and without the slash, so `raw_path` has to tell.
    root = request.scope["root_path"]
    if root and request.scope.get("raw_path") == root.encode():
        return RedirectResponse(f"{root}/")  # the links of the page are relative to it
    content = _fill(page)
    return Response(content, media_type="text/html", headers=page.headers)


@lru_cache
def _fill(page: Page) -> bytes:
    """Return the bytes of *page* with the formats that the server accepts, made once."""
    decodable = [name for name in FORMATS if not missing_extra(name)]
    return page.html.replace("{formats}", describe_formats(decodable, "or")).encode()


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    """Return the OpenAPI document, which FastAPI makes at the first request."""
    root = request.scope["root_path"]
    document = request.app.openapi()
    if request.app.state.keys is not None:
        document = with_keys(document)
    return json_response({**document, "servers": [{"url": root}]} if root else document)


def with_keys(document: dict[str, Any]) -> dict[str, Any]:
    """Add the two headers with an API key, either of which a request needs, to an OpenAPI *document*."""
    schemes = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    components = {**document.get("components", {}), "securitySchemes": schemes}
    no_scopes: list[str] = []
    security = [{name: no_scopes} for name in schemes]
    return {**document, "components": components, "security": security}


class SharedResponse(Response):
    """Bytes that clients share: each piece is copied for a client when it has taken those before."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send the pieces, each when the connection has room for it."""
        start = {"status": self.status_code, "headers": self.raw_headers}

        await send({"type": "http.response.start", **start})
        for begin in range(0, max(1, len(self.body)), PIECE_BYTES):
            end = begin + PIECE_BYTES
            piece = bytes(self.body[begin:end])
            is_last = end >= len(self.body)
            await send({"type": "http.response.body", "body": piece, "more_body": not is_last})


async def _send_static_file(content: bytes, media_type: str) -> Response:
    headers = {"Cache-Control": "max-age=86400"}
    return SharedResponse(content, media_type=media_type, headers=headers)


class Examples(StrictModel):
    """Names of the files of `/examples/0`, `/examples/1` and so on."""

    names: tuple[str, ...]


@dataclass(eq=False)
class Example:
    """A photograph that the page offers; its file is read at the first request, and again only after an error."""

    path: Path
    _reading: asyncio.Task[bytes] | None = None

    async def read(self) -> bytes:
        """Return the bytes of the file; raises `OSError`, also if the disk hangs."""
        if self._reading is None or self._has_failed(self._reading):
            work = asyncio.to_thread(read_file, self.path, MAX_BYTES)
            self._reading = asyncio.create_task(work)
        async with asyncio.timeout(EXAMPLE_SECONDS):
            return await asyncio.shield(self._reading)

    def _has_failed(self, reading: asyncio.Task[bytes]) -> bool:
        return reading.done() and (reading.cancelled() or reading.exception() is not None)


def list_examples(path: Path | None) -> list[Example]:
    """List at most `MAX_EXAMPLES` photographs below *path*, spread over it; raises `DataError`."""
    if path is None:
        return []
    root = data_folder(path, "photos that visitors can try")
    with naming_all_undecodable(root):
        names, _ = list_images(root)
    if not names:
        raise DataError(f"{root}: holds no images; give a folder with photos")

    step = math.ceil(len(names) / MAX_EXAMPLES)
    return [Example(root / os.fsdecode(name)) for name in names[::step]]


@router.get("/examples")
async def examples(request: Request) -> Response:
    """Return the names of the examples that the page offers, those of the setting `examples`."""
    return json_response(
        Examples(names=tuple(one.path.name for one in request.app.state.examples))
    )


@router.get("/examples/{number}")
async def example(request: Request, number: int) -> Response:
    """Return the bytes of the example *number*, which cost a key as much as one image."""
    examples: list[Example] = request.app.state.examples
    if not 0 <= number < len(examples):
        raise HTTPException(404, "no such example")
    context: RequestContext = request.scope["state"]["context"]
    if context.rate_limit is not None:
        context.rate_limit.spend(1)

    try:
        content = await examples[number].read()
    except OSError as error:  # or `TimeoutError`, which is one
        raise HTTPException(404, "no such example") from error

    return SharedResponse(
        content, media_type=media_type_of(content[:HEAD_BYTES]), headers=_INERT
    )


INDEX = Page(
    _read("index.html"),
    [
        "dom.js",
        "key.js",
        "markdown.js",
        "snippets.js",
        "several.js",
        "answer.js",
        "about.js",
        "sources.js",
        "index.js",
    ],
    policy=TRUSTED_TYPES,
)
_SWAGGER = get_swagger_ui_html(
    openapi_url="openapi.json",
    title="API · sopdeploy",
    swagger_js_url="docs/swagger-ui-bundle.js",
    swagger_css_url="docs/swagger-ui.css",
    swagger_favicon_url=_ICON,
)
# With the field for the key.
_SWAGGER_HTML = bytes(_SWAGGER.body).decode().replace("<body>", f"<body>{_read('docs.html')}")
# Without `TRUSTED_TYPES`: Swagger UI turns descriptions into markup itself, after it has
# removed scripts.
DOCS = Page(_SWAGGER_HTML, ["dom.js", "key.js", "docs.js"], assets=("'self'",))
_ERRORS = Page(_read("errors.html"), [], policy=TRUSTED_TYPES)

for path, page in {"/": INDEX, "/docs": DOCS, "/errors": _ERRORS}.items():
    router.add_api_route(path, partial(_show_page, page))
for path, media_type in PAGE_FILES.items():  # read once
    content = (files("fastapi_offline") / "static" / path.removeprefix("/docs/")).read_bytes()
    router.add_api_route(path, partial(_send_static_file, content, media_type))
