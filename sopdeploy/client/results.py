"""What a server answers, typed. Unknown keys are passed over: a newer server may say more."""

import re
from typing import Any, TypeVar

import httpx
import pydantic

from sopdeploy.config import StrictModel, first_problem
from sopdeploy.errors import ServiceError

Kind = TypeVar("Kind", bound="Received")
DURATION = re.compile(r"([a-z]+);dur=(\d+(?:\.\d+)?)")


class Received(StrictModel):
    """A part of an answer."""

    model_config = pydantic.ConfigDict(extra="ignore")


class ClassProbability(Received):
    """One class and how probable it is, 0 to 1."""

    label: str
    probability: float


class Expert(Received):
    """One expert that a gate chose, by its number, and its weight in the sum."""

    expert: int
    weight: float


class Problem(Received):
    """Why one image has no answer; `code` is stable, `detail` is for people."""

    code: str
    status: int
    detail: str


class Classification(Received):
    """The answer to one image: its classes, best first, or the `error` it met among others.

    `gates` are the experts that a gated network chose, best first, where they were asked for; `warnings` name
    what decoding changed; `model_digest` is the id of the bundle that answered; `timing_ms` is how long the
    server took by stage (receive, decode, queue, infer), of several images in one request the slowest.
    """

    classes: tuple[ClassProbability, ...] = ()
    gates: tuple[Expert, ...] | None = None
    warnings: tuple[str, ...] = ()
    error: Problem | None = None
    model_digest: str = ""
    timing_ms: dict[str, float] = pydantic.Field(default_factory=dict)


class ModelInfo(Received):
    """One network that answers; `id` is its bundle's, `labels` how many classes it knows."""

    name: str
    id: str
    bundle: str
    model: str
    labels: int
    precision: str
    runtime: str
    device: str
    largest_batch: int


class ServerInfo(Received):
    """The server's version and its models."""

    server: str
    models: tuple[ModelInfo, ...]


def classifications(response: httpx.Response) -> list[Classification]:
    """Return the results in *response*, in the order of the images; raises `ServiceError`."""
    envelope = {
        "model_digest": response.headers.get("X-Model-Digest", ""),
        "timing_ms": timing(response.headers.get("Server-Timing", "")),
    }
    body = document(response)
    rows = body.get("results", [body])
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and ("classes" in row or "error" in row) for row in rows
    ):
        raise foreign(response, "no results in it")
    return [parsed(Classification, {**row, **envelope}, response) for row in rows]


def server_info(response: httpx.Response) -> ServerInfo:
    """Return what `/info` says; raises `ServiceError` where it is another server's."""
    return parsed(ServerInfo, document(response), response)


def problem_of(response: httpx.Response) -> ServiceError:
    """Return the error that *response* tells; its body may be anything, a proxy's page say."""
    status = response.status_code
    try:
        problem = Problem.model_validate_json(response.content)
    except pydantic.ValidationError:
        problem = Problem(code="http_error", status=status, detail=response.reason_phrase or "no explanation")
    where = f"{response.request.url}: {status} {problem.code}"
    return ServiceError(f"{where}: {problem.detail}", code=problem.code, status=status)


def timing(header: str) -> dict[str, float]:
    """Return the milliseconds by stage of a `Server-Timing` header."""
    return {stage: float(milliseconds) for stage, milliseconds in DURATION.findall(header)}


def document(response: httpx.Response) -> dict[str, Any]:
    """Return the JSON object in *response*; raises `ServiceError`."""
    try:
        value = response.json()
    except ValueError as problem:
        raise foreign(response, "not JSON") from problem
    if not isinstance(value, dict):
        raise foreign(response, "no JSON object")
    return value


def parsed(kind: type[Kind], value: dict[str, Any], response: httpx.Response) -> Kind:
    """Return *value* as a *kind*; raises `ServiceError`."""
    try:
        return kind.model_validate(value)
    except pydantic.ValidationError as problem:
        raise foreign(response, first_problem(problem)) from problem


def foreign(response: httpx.Response, what: str) -> ServiceError:
    """Return the error of an answer that no sopdeploy server gives."""
    return ServiceError(
        f"{response.request.url}: answered {response.status_code}, but not as sopdeploy does ({what}); "
        "is the URL right?",
        code="foreign_answer",
        status=response.status_code,
    )
