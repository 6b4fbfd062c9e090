"""Health, metrics, model information, self-test and rollback endpoints."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from sopdeploy.bundle.class_maps import FEATURES
from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.probes import deviation, read_probes
from sopdeploy.errors import BundleError, ParityError
from sopdeploy_service.api.schema import (
    Card,
    CertificateSummary,
    Health,
    Info,
    ModelInfo,
    SelfTest,
)
from sopdeploy_service.api.upload import (
    admit,
    json_response,
    prediction_of,
    service_of,
    use_model,
)
from sopdeploy_service.http.middleware import require_admin
from sopdeploy_service.http.problems import problem_responses
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.registry import NOT_CONTROLLED
from sopdeploy_service.inference.results import GATES, Prediction, RejectedError, Rejection
from sopdeploy_service.inference.service import Service
from sopdeploy_service.observability.request_context import RequestContext

router = APIRouter()

Collect: TypeAlias = Callable[[Mapping[str, str]], Awaitable[bytes]]

CREDENTIALS = ("authorization", "x-api-key")  # forwarded to the other processes
README = "README.md"


@router.get("/livez", summary="Liveness", response_model=Health)
async def livez(request: Request) -> Response:
    """Return status 200, or 503 if the runtime is dead and the process must be restarted."""
    state = service_of(request).state
    return json_response(Health(status=state), status=503 if state == "engine_dead" else 200)


@router.get("/readyz", summary="Readiness", response_model=Health)
async def readyz(request: Request) -> Response:
    """Return status 200 if the server accepts images, and 503 if it is draining, has no model or is dead.

    The probes of every bundle are replayed before the server starts to listen.
    """
    state = service_of(request).state
    return json_response(Health(status=state), status=200 if state == "ok" else 503)


@router.get("/metrics", summary="Prometheus metrics", include_in_schema=False)
async def metrics(request: Request, *, own: bool = False) -> Response:
    """Return the metrics of this server: of all its processes, or of this one only with *own*."""
    collect: Collect | None = request.app.state.collect_metrics
    if own or collect is None:
        return Response(generate_latest(service_of(request).metrics.registry), media_type=CONTENT_TYPE_LATEST)
    known = {name: request.headers[name] for name in CREDENTIALS if name in request.headers}
    return Response(await collect(known), media_type=CONTENT_TYPE_LATEST)


@router.get("/info", summary="Loaded models", response_model=Info)
async def info(request: Request) -> Response:
    """Describe each loaded model and its runtime."""
    service = service_of(request)
    loaded = service.registry.models()
    current = [model for model in loaded if service.registry.find(model.name) is model]
    more: dict[str, Any] = {}
    for observer in service.observers:
        more |= observer.info()
    return json_response(
        Info(
            server=request.app.version,
            models=tuple(model_info(model) for model in current),
            previous={model.name: model.version for model in loaded if model not in current},
            **more,
        )
    )


def model_info(model: Model) -> ModelInfo:
    """Describe *model* for `/info`."""
    manifest, runtime = model.bundle.manifest, model.loaded.runtime
    thresholds = model.thresholds
    return ModelInfo(
        name=model.name,
        bundle=model.bundle.name,
        id=manifest.id,
        model=manifest.model,
        labels=len(model.labels),
        precision=manifest.precision,
        preprocess=manifest.preprocess,
        runtime=runtime.name,
        device=runtime.device,
        largest_batch=model.largest_batch,
        versions=manifest.versions,
        fast_decode=model.loaded.fast_decode,
        thresholds=None if thresholds is None else dict(zip(model.labels, thresholds, strict=True)),
        class_maps=model.loaded.class_maps is not None,
    )


@router.get(
    "/v1/card",
    summary="Model card and certificate",
    response_model=Card,
    responses=problem_responses(400, 404, 422, 503),
)
async def card(request: Request, model: str | None = None) -> Response:
    """Return the model card of *model* (required if several are loaded) and a summary of its certificate."""
    chosen = service_of(request).registry.find(model)
    with chosen.in_use():  # a replaced model closes its files
        return json_response(await asyncio.to_thread(read_card, chosen.bundle))


def read_card(bundle: Bundle) -> Card:
    """Read the model card of *bundle* and summarize its certificate.

    The text is empty if the bundle has no README.md. The summary is None if the JSON of the certificate has
    another structure.
    """
    readme = bundle.path / README
    text = readme.read_text("utf-8", "replace") if README in bundle.manifest.files else ""
    certificate = json.loads((bundle.path / "certificate.json").read_bytes())
    try:
        roots = certificate["roots"]
        summary = CertificateSummary(
            proof=certificate["proof"],
            compared=certificate["compared"],
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
        summary = None
    sizes = [output.shape[-1] for output in bundle.manifest.outputs if output.name == GATES]
    return Card(bundle=bundle.name, text=text, certificate=summary, experts=next(iter(sizes), 0) or 0)


@router.get(
    "/selftest",
    summary="Replay the probes",
    response_model=SelfTest,
    responses=problem_responses(400, 401, 403, 404, 422, 429, 500, 503, 504),
)
async def selftest(request: Request, model: str | None = None) -> Response:
    """Replay the probes of the bundle through the runtime, between the requests of clients."""
    chosen, deadline = admit(request, model)
    with chosen.in_use():
        return json_response(await self_test(service_of(request), chosen, deadline, request.state.context))


async def self_test(service: Service, model: Model, deadline: float, context: RequestContext) -> SelfTest:
    """Replay the probes of *model* through *service* and compare the outputs with the bundle's.

    Raises `RejectedError` if they differ or cannot be replayed.
    """
    try:
        probes = await asyncio.to_thread(read_probes, model.bundle.probes)
    except BundleError as problem:  # the files changed after the start; the runtime has its own copy
        raise selftest_failed(f"the probes cannot be read: {problem}") from problem
    started = time.monotonic()
    images, features = probes.images, FEATURES in probes.expected
    if context.rate_limit is not None:  # a key whose burst is smaller could never pay for all probes
        context.rate_limit.spend(min(len(images), context.rate_limit.burst))
    paid = replace(context, rate_limit=None)
    context.images = len(images)
    size = min(len(images), service.settings.queue_size, model.largest_batch)
    predictions: list[Prediction] = []
    for start in range(0, len(images), size):
        part = images[start : start + size]
        outcomes = await service.infer(model, part, deadline, paid, features=features)
        predictions += [prediction_of(outcome) for outcome in outcomes]
    measured = {}
    for name, expected in probes.expected.items():
        outputs = {name: np.stack([prediction.outputs[name] for prediction in predictions])}
        try:
            measured[name] = deviation(name, outputs, expected)
        except ParityError as problem:
            raise selftest_failed(str(problem)) from problem
        if not measured[name] <= probes.tolerance[name]:
            message = (
                f"output {name!r} deviates by {measured[name]:.3g}, but the tolerance is "
                f"{probes.tolerance[name]:.3g}; stop this server and check its device"
            )
            raise selftest_failed(message)
    return SelfTest(
        model=model.name,
        version=model.version,
        images=len(predictions),
        deviation=measured,
        tolerance=probes.tolerance,
        seconds=round(time.monotonic() - started, 3),
    )


def selftest_failed(message: str) -> RejectedError:
    """Create the error of a self-test, status 500."""
    return RejectedError(Rejection("selftest_failed", 500, message))


@router.post(
    "/v1/models/{name}/rollback",
    summary="Activate the previous version",
    response_model=ModelInfo,
    responses=problem_responses(401, 403, 404, 409, 422),
    dependencies=[Depends(require_admin)],
)
async def roll_back(request: Request, name: str) -> Response:
    """Switch back to the version before the last load; it is still loaded."""
    service = service_of(request)
    if not service.settings.model_control:
        raise RejectedError(NOT_CONTROLLED)
    return json_response(model_info(use_model(request, await service.registry.roll_back(name))))
