"""The endpoints that say how the server is and what it serves."""

import asyncio
import time
from importlib import import_module
from importlib.metadata import version

import numpy as np
from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from sopdeploy.bundle.probes import Probes, deviation, read_probes
from sopdeploy.errors import BundleError, ParityError
from sopdeploy_service.api.schema import Health, Info, ModelInfo, SelfTest
from sopdeploy_service.api.upload import admit, context_of, service_of, unless_rejected
from sopdeploy_service.api.web import Card, read_card
from sopdeploy_service.http.auth import needs
from sopdeploy_service.http.problems import RejectedError, described, json_response
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.registry import NOT_CONTROLLED
from sopdeploy_service.inference.results import Prediction, Rejection
from sopdeploy_service.inference.service import Service
from sopdeploy_service.observability.request_context import RequestContext


async def self_test(
    service: Service, model: Model, deadline: float, context: RequestContext
) -> SelfTest | Rejection:
    """Replay the probes of *model* through *service*; a refusal where that, or the comparison, fails."""
    try:
        probes = await asyncio.to_thread(read_probes, model.bundle.probes)
    except (
        BundleError
    ) as problem:  # the folder was moved or changed since the start; the engine has its own copy
        return Rejection("selftest_failed", 500, f"the probes are not where they were: {problem}")
    started = time.monotonic()
    room = min(len(probes.images), service.settings.queue_size, model.largest_batch)
    answers: list[Prediction] = []
    for start in range(0, len(probes.images), room):
        found = await service.infer(model, probes.images[start : start + room], deadline, context)
        if isinstance(found, Rejection):
            return found
        for outcome in found:
            if isinstance(outcome, Rejection):
                return outcome
            answers.append(outcome)
    try:
        measured = {name: compare(name, probes, answers) for name in probes.expected}
    except ParityError as problem:
        return Rejection("selftest_failed", 500, str(problem))
    return SelfTest(
        model=model.name,
        version=model.version,
        images=len(answers),
        deviation=measured,
        tolerance=probes.tolerance,
        seconds=round(time.monotonic() - started, 3),
    )


def compare(name: str, probes: Probes, answers: list[Prediction]) -> float:
    """Return by how much output *name* deviates; raises `ParityError` where that is beyond its bound."""
    found = {name: np.stack([answer.outputs[name] for answer in answers])}
    off = deviation(name, found, probes.expected[name])
    if not off <= probes.tolerance[name]:
        raise ParityError(
            f"output {name!r} deviates by {off:.3g}, the bound is {probes.tolerance[name]:.3g}; "
            "take this server out and look at its device"
        )
    return off


router = APIRouter()

CREDENTIALS = ("authorization", "x-api-key")  # passed on to the siblings


@router.get("/livez", summary="Is the process worth keeping?", response_model=Health)
async def livez(request: Request) -> Response:
    """Give 200 unless the engine is dead; then the process should be restarted."""
    state = service_of(request).state
    return json_response(Health(status=state), status=503 if state == "engine_dead" else 200)


@router.get("/readyz", summary="Should it get requests now?", response_model=Health)
async def readyz(request: Request) -> Response:
    """Give 200 while images are answered; 503 while draining, without a model and after an engine's death.

    The probes of every bundle were replayed before this server began to listen.
    """
    state = service_of(request).state
    return json_response(Health(status=state), status=200 if state == "ok" else 503)


@router.get("/metrics", summary="For Prometheus", include_in_schema=False)
async def metrics(request: Request, *, own: bool = False) -> Response:
    """Give the metrics of this server; of several processes behind one port, all of them unless *own*."""
    siblings: dict[str, str] = request.app.state.siblings
    if own or not siblings:
        return Response(service_of(request).metrics.render(), media_type=CONTENT_TYPE_LATEST)
    known = {name: request.headers[name] for name in CREDENTIALS if name in request.headers}
    several = import_module(
        "sopdeploy_service.observability.multiprocess_metrics"
    )  # httpx: one process need not load it
    return Response(await several.collect(siblings, known), media_type=CONTENT_TYPE_LATEST)


@router.get("/info", summary="Which networks answer here?", response_model=Info)
async def info(request: Request) -> Response:
    """Give the facts of each model and of what it runs on."""
    repository = service_of(request).registry
    loaded = repository.models()
    current = [model for model in loaded if repository.find(model.name) is model]
    return json_response(
        Info(
            server=version("sopdeploy"),
            models=tuple(model_info(model) for model in current),
            previous={model.name: model.version for model in loaded if model not in current},
        )
    )


@router.get(
    "/v1/card",
    summary="What is this network, and what was proved of it?",
    response_model=Card,
    responses=described(400, 404, 422, 503),
)
async def card(request: Request, model: str | None = None) -> Response:
    """Give the model card of *model* (needed where several answer) and its certificate in short."""
    chosen = unless_rejected(service_of(request).registry.find(model))
    return json_response(await asyncio.to_thread(read_card, chosen.bundle))


def model_info(model: Model) -> ModelInfo:
    """Return what `/info` says of *model*."""
    manifest, runtime = model.bundle.manifest, model.loaded.runtime
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
    )


@router.get(
    "/selftest",
    summary="Does it still compute what the bundle promises?",
    response_model=SelfTest,
    responses=described(400, 401, 403, 404, 422, 429, 500, 503, 504),
)
async def selftest(request: Request, model: str | None = None) -> Response:
    """Replay the bundle's probes through the engine, between the requests of others."""
    chosen, deadline = admit(request, model)
    found = await self_test(service_of(request), chosen, deadline, context_of(request))
    return json_response(unless_rejected(found))


@router.post(
    "/v1/models/{name}/rollback",
    summary="Let the version before answer again",
    response_model=ModelInfo,
    responses=described(401, 403, 404, 409, 422),
    dependencies=[Depends(needs("admin"))],
)
async def roll_back(request: Request, name: str) -> Response:
    """Turn back what a load did, at once: the version before it is still loaded."""
    service = service_of(request)
    if not service.settings.model_control:
        raise RejectedError(NOT_CONTROLLED)
    model = unless_rejected(await service.registry.roll_back(name))
    request.state.model = model
    return json_response(model_info(model))
