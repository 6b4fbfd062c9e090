"""The server of the label page: its routes, and the requests that it refuses.

It answers only to its own names and pages, as a service with the same settings does, and only
with the random key of the address that it prints: other users of this machine reach it, too.
Its connections have the limits of the service's. It decodes no image: a browser gets the files.
"""

import asyncio
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.resources import files
from pathlib import Path
from shlex import join
from typing import Annotated, Literal
from urllib.parse import parse_qs

import pydantic
import uvicorn
from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint

from sopdeploy.bundle.folder import read_manifest
from sopdeploy.config import StrictModel, matching
from sopdeploy.errors import BundleError, SopdeployError
from sopdeploy.files import BEST, LATEST, MAX_IMAGE_BYTES, read_file
from sopdeploy.images.signatures import HEAD_BYTES, media_type_of
from sopdeploy.names import as_utf8
from sopdeploy.project import BUNDLES, RUNS
from sopdeploy_service.api.web import TRUSTED_TYPES, Page
from sopdeploy_service.http.strict_json import parse_json
from sopdeploy_service.inference.results import RejectedError
from sopdeploy_service.labelling.label.folders import GoneError, LabelFolders
from sopdeploy_service.labelling.label.heap import Embed
from sopdeploy_service.labelling.label.labelled import Labelled
from sopdeploy_service.labelling.label.order import role_of
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.origins import OwnOrigins, join_headers, without_prefix
from sopdeploy_service.server.connections import Connections
from sopdeploy_service.server.http_protocol import limited_config
from sopdeploy_service.server.sockets import bind, url
from sopdeploy_service.settings import Settings

# Its name has the port, because a browser sends the cookies of a host to all its ports.
COOKIE = "sopdeploy-label-{}"
MAX_BODY_BYTES = 10_000
BODY_SECONDS = 10.0
MAX_CONNECTIONS = 100
MAX_THUMBNAILS = 24  # photographs that the page offers to label at once
MAX_CELLS = 48  # of the grid of a class
NEW_CLASS = "?"  # of the grid of photographs that may be a new class; no class has this name
IMAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
_FOLDER = files("sopdeploy_service.labelling.label") / "pages"
_HTML = (_FOLDER / "label.html").read_text("utf-8")
_PAGE = Page(_HTML, ["dom.js", "label.js"], policy=TRUSTED_TYPES, folder=_FOLDER)


# A random name of a page in a browser; different ones get different photographs.
Session = Annotated[str, Header(alias="X-Session", max_length=100)]


PhotographId = Annotated[
    str, pydantic.Field(max_length=32), matching(r"[0-9a-f]{32}", "id of a photo")
]


class GivenLabel(StrictModel):
    """What the user says about the photograph `id`; `name` is the class of the kind "class"."""

    id: PhotographId
    kind: Literal["class", "unknown", "skip"]
    name: Annotated[str, pydantic.Field(max_length=1000)] = ""


class Correction(StrictModel):
    """The right class `name` of the labelled photograph `id`; None is "not one of ours"."""

    id: PhotographId
    name: Annotated[str, pydantic.Field(max_length=1000)] | None


async def read_label(request: Request) -> GivenLabel:
    """Read the body of *request*; raises `RejectedError` unless it is a label."""
    return parse_json(GivenLabel, await request.body(), MAX_BODY_BYTES)


async def read_correction(request: Request) -> Correction:
    """Read the body of *request*; raises `RejectedError` unless it is a correction."""
    return parse_json(Correction, await request.body(), MAX_BODY_BYTES)


def intercept(
    request: Request, origins: OwnOrigins, settings: Settings, key: str
) -> Response | None:
    """Return the response to a request that no route may handle; None if one may.

    Refused are requests that are foreign to *origins*, those without the *key*, and POSTs that
    are too large or have no JSON. A request for the page with the key in its address gets a
    cookie with the key, and a redirect to the address without it.
    """
    headers = join_headers(request.scope["headers"])
    peer = request.client.host if request.client else ""

    navigates = request.method == "GET" and request.scope["path"] == "/"
    if origins.why_foreign(headers, peer, is_link=navigates):
        return PlainTextResponse("requests of other pages and for other hosts are refused", 403)

    # A form of another page cannot send this type, and the length is known before the body is
    # read.
    if request.method == "POST":
        if headers.get("content-type") != "application/json":
            return PlainTextResponse("send application/json", 415)

        length = headers.get("content-length")
        if length is None or int(length) > MAX_BODY_BYTES:
            return PlainTextResponse(
                f"send at most {MAX_BODY_BYTES} bytes, with a Content-Length", 413
            )

    # The cookie holds the key; the address that the command prints has it only once.
    cookie = COOKIE.format(settings.port)
    if secrets.compare_digest(request.cookies.get(cookie, "").encode(), key.encode()):
        return None

    key_in_address = parse_qs(request.url.query).get("key", [""])[0]
    if navigates and secrets.compare_digest(key_in_address.encode(), key.encode()):
        # After this redirect, the key is not in the history of the browser.
        response = RedirectResponse(f"{settings.root_path or '.'}/", 303)
        response.set_cookie(cookie, key, httponly=True, samesite="lax")
        return response
    return PlainTextResponse("open the address that `sopdeploy label` has printed", 401)


async def guard(
    origins: OwnOrigins,
    settings: Settings,
    key: str,
    request: Request,
    call_next: RequestResponseEndpoint,
) -> Response:
    """Refuse a request, also one whose body is slow, or handle it without the prefix `root_path` of its path."""
    full_path = request.scope["path"]
    root_path = settings.root_path
    request.scope["path"] = without_prefix(full_path, root_path)

    if (response := intercept(request, origins, settings, key)) is not None:
        return response

    if full_path == root_path != "":
        return RedirectResponse(f"{root_path}/")  # the links of the page are relative to it
    try:
        async with asyncio.timeout(BODY_SECONDS):
            await request.body()  # is kept for `call_next`
    except TimeoutError:
        return PlainTextResponse("the body did not arrive in time", 408)
    return await call_next(request)


def label_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """Create the uvicorn configuration of the label page: that of the service, with fewer connections."""
    fewer = settings.model_copy(update={"max_connections": MAX_CONNECTIONS})
    return limited_config(app, Connections(fewer, Metrics()))


def create_label_app(folders: LabelFolders, settings: Settings, key: str) -> FastAPI:
    """Create the app that labels the photographs of *folders*, for requests that `intercept` lets pass."""
    names = {"localhost", settings.host, socket.gethostname()}
    origins = OwnOrigins(names, settings.allowed_hosts, settings.trusted_proxies)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    lock = threading.Lock()  # of *folders*; the routes run in threads
    labelled: dict[str, Labelled] = {}  # what `/labelled` listed last

    _add_labelling(app, folders, lock)
    _add_corrections(app, folders, lock, labelled)
    _add_images(app, folders, lock, labelled)
    _add_error_handlers(app, folders)
    app.add_middleware(BaseHTTPMiddleware, dispatch=partial(guard, origins, settings, key))
    return app


def _add_labelling(app: FastAPI, folders: LabelFolders, lock: threading.Lock) -> None:
    """Add to *app* the page, what it shows, and the labels of photographs that wait for one."""

    @app.get("/")
    def page() -> Response:
        with lock:
            folders.read()
        return Response(_PAGE.html, media_type="text/html", headers=_PAGE.headers)

    @app.get("/state")
    def state(session: Session = "") -> LabelState:
        with lock:
            return describe_next(folders, session)

    @app.get("/grids")
    def grids() -> Grids:
        with lock:
            ids_by_class = folders.suggested()
            if new := folders.maybe_new_class():
                ids_by_class = {NEW_CLASS: new, **ids_by_class}

        return Grids(
            grids=tuple(
                Grid(name=name, ids=tuple(ids[:MAX_CELLS]), count=len(ids))
                for name, ids in ids_by_class.items()
            )
        )

    @app.post("/label")
    def label(
        answer: Annotated[GivenLabel, Depends(read_label)], session: Session = ""
    ) -> LabelState:
        with lock:
            if answer.kind == "skip":
                folders.skip(answer.id)
            else:
                folders.label(answer.id, answer.name if answer.kind == "class" else None)
            return describe_next(folders, session)

    @app.post("/undo")
    def undo(session: Session = "") -> LabelState:
        with lock:
            folders.undo()
            return describe_next(folders, session)


def _add_corrections(
    app: FastAPI, folders: LabelFolders, lock: threading.Lock, labelled: dict[str, Labelled]
) -> None:
    """Add to *app* the list of photographs that have a label, and its changes; *labelled* is the last list."""

    def list_labels() -> LabelledPhotographs:
        labelled.clear()
        labelled.update(folders.labelled())
        return LabelledPhotographs(
            photographs=tuple(
                LabelledPhotograph(id=identity, name=photo.name, held_out=photo.is_held_out)
                for identity, photo in labelled.items()
            ),
            classes=tuple(folders.classes()),
        )

    @app.get("/labelled")
    def show_labels() -> LabelledPhotographs:
        with lock:
            return list_labels()

    @app.post("/correct")
    def correct(
        answer: Annotated[Correction, Depends(read_correction)],
    ) -> LabelledPhotographs:
        with lock:
            if answer.id not in labelled:
                raise GoneError("that photo is not in the list; read the list again")
            folders.correct(labelled[answer.id], answer.name)
            return list_labels()


def _add_images(
    app: FastAPI, folders: LabelFolders, lock: threading.Lock, labelled: dict[str, Labelled]
) -> None:
    """Add to *app* the files of photographs that wait for a label, or are *labelled*."""

    @app.get("/images/{identity}")
    def image(identity: str) -> Response:
        with lock:
            photo = folders.waiting.get(identity) or labelled.get(identity)
            path = None if photo is None else photo.path

        if path is None:
            return JSONResponse({"detail": "no such photo"}, 404)
        try:
            content = read_file(path, MAX_IMAGE_BYTES)
        except OSError:  # the server has deleted it
            return JSONResponse({"detail": "no such photo"}, 404)

        return Response(
            content, media_type=media_type_of(content[:HEAD_BYTES]), headers=IMAGE_HEADERS
        )


def _add_error_handlers(app: FastAPI, folders: LabelFolders) -> None:
    """Let *app* respond to errors of the user, of a body, and of the disk of *folders*."""

    @app.exception_handler(SopdeployError)
    def refuse(_request: Request, error: SopdeployError) -> Response:
        return JSONResponse(
            {"detail": as_utf8(error)}, 409 if isinstance(error, GoneError) else 422
        )

    @app.exception_handler(RejectedError)
    def refuse_body(_request: Request, error: RejectedError) -> Response:
        return JSONResponse({"detail": error.reason.message}, 422)

    @app.exception_handler(OSError)
    def fail(_request: Request, error: OSError) -> Response:
        # Of a rename, the folder that has no room is the second one.
        path = error.filename2 or error.filename or folders.photos
        detail = f"{path}: cannot be read or written ({error.strerror}); nothing was changed"
        return JSONResponse({"detail": as_utf8(detail)}, 507)


class ShownPhotograph(StrictModel):
    """The photograph to label; `known` as in `http_api.Classes`.

    `decides` if its label decides about the next bundle. `reported` if a person has
    said that the answer was wrong; `suggested` is then the class of
    this person.
    """

    id: str
    decides: bool
    known: bool | None
    reported: bool
    suggested: str | None


class ShownClass(StrictModel):
    """A class to choose, and its probability for the photograph; None if that is not known."""

    name: str
    probability: float | None


class Grid(StrictModel):
    """The first `ids` of `count` photographs with the suggested class `name`, the surest ones first."""

    name: str
    ids: tuple[str, ...]
    count: int


class Grids(StrictModel):
    """A grid for each class that is suggested for photographs of a heap, and one for a new class."""

    grids: tuple[Grid, ...]


class LabelledPhotograph(StrictModel):
    """A photograph that has a label: its class `name`, None for none of ours."""

    id: str
    name: str | None
    held_out: bool


class LabelledPhotographs(StrictModel):
    """The photographs that were labelled last, the latest first, and all classes."""

    photographs: tuple[LabelledPhotograph, ...]
    classes: tuple[str, ...]


class LabelState(StrictModel):
    """What the page shows.

    `next` has the IDs of the photographs shown as thumbnails; the first is the one to label.
    `classes` begin with the one that a person has suggested, then the most probable one. `done`
    and `left` are numbers of photographs; the skipped ones are done. `progress` says what the
    labels are for, and `command` trains with them.
    """

    photograph: ShownPhotograph | None
    next: tuple[str, ...]
    classes: tuple[ShownClass, ...]
    done: int
    left: int
    progress: str
    command: str


def describe_next(folders: LabelFolders, session: str = "") -> LabelState:
    """Describe the next photograph of *session*, the classes and the progress.

    *folders* are read again if no photograph waits.
    """
    if not folders.waiting:
        folders.read()  # the server may have kept others
    upcoming = folders.upcoming(session, MAX_THUMBNAILS)

    # Describe the photograph that comes next.
    photograph: ShownPhotograph | None = None
    suggested: str | None = None
    probabilities: dict[str, float] = {}

    if folders.waiting:
        # A photograph of a heap has no record.
        identity = upcoming[0]
        record = folders.waiting[identity].record
        probabilities = folders.probabilities(identity)

        decides = record is not None and role_of(record) == "decides"
        known = None if record is None else record.known
        is_reported = record is not None and "reported" in record.reasons
        suggested = folders.suggestion(identity)

        photograph = ShownPhotograph(
            id=identity,
            decides=decides,
            known=known,
            reported=is_reported,
            suggested=suggested,
        )

    # The class that a person has suggested comes first, then the others by probability; classes
    # without a probability come last.
    names = set(folders.classes())
    if suggested is not None and folders.can_be_class(suggested):
        names.add(suggested)
    ordered_names = sorted(
        names,
        key=lambda name: (name != suggested, -probabilities.get(name, -1.0), name),
    )

    return LabelState(
        photograph=photograph,
        next=tuple(upcoming),
        classes=tuple(
            ShownClass(name=name, probability=probabilities.get(name)) for name in ordered_names
        ),
        done=len(folders.steps),
        left=len(folders.waiting),
        progress=folders.progress(),
        command=as_utf8(training_command(folders)),
    )


def training_command(folders: LabelFolders, photos: Path | None = None) -> str:
    """Write the command that trains on the photographs of *folders*, which the user named *photos*."""
    photos = photos or folders.photos
    # The folder of unknown photographs is beside *photos*, and written as the user wrote that:
    # relative or not. `.` and `..` show no name, so its absolute path is needed.
    has_name = photos.name not in {"", ".."}
    unknown = photos.with_name(folders.unknown.name) if has_name else folders.unknown
    words = ["--data", str(photos), *(["--unknown", str(unknown)] if unknown.is_dir() else ())]
    return f"sopdeploy train {join([*words, *_live_option()])}"


def _live_option() -> list[str]:
    """Return the option `--from` with the link to the live bundle, if it and its run are here, else nothing.

    `train --from` repeats the recipe of that run, and protects its classes from new ones with few
    images (`procedure.margins`).
    """
    # `promote` makes the links other than `latest`, each to a live bundle; the first one counts.
    for link in sorted(BUNDLES.glob("*")):
        if not link.is_symlink() or link.name == LATEST:
            continue

        with suppress(BundleError):
            origin = read_manifest(link).origin
            if origin is not None and (RUNS / origin.run / BEST).is_file():
                return ["--from", str(link)]
    return []


def run_label_server(
    kept: Path,
    photos: Path,
    settings: Settings,
    on_ready: Callable[[str, int], None],
    embed: Embed | None = None,
) -> LabelFolders:
    """Serve the label page until Ctrl-C or SIGTERM; return the folders with the steps of the session.

    *on_ready* receives the URL to open, with a random key, and the number of photographs.
    *embed* is that of `LabelFolders`. Raises `ConfigError` if it cannot listen, and the
    `DataError` of `LabelFolders`.
    """
    folders = LabelFolders(kept, photos, embed)
    with bind(settings.host, settings.port) as listener:
        listener.listen()  # requests from now on wait for the server

        key = secrets.token_urlsafe(16)
        # The setting may be 0, for any free port.
        bound = settings.model_copy(update={"port": listener.getsockname()[1]})

        app = create_label_app(folders, bound, key)
        # An address that other machines can open, too.
        address = url(listener).replace("//0.0.0.0:", f"//{socket.gethostname()}:")
        on_ready(f"{address}/?key={key}", len(folders.waiting))
        with suppress(KeyboardInterrupt):  # uvicorn raises it after its end
            uvicorn.Server(label_config(app, settings)).run(sockets=[listener])
    return folders
