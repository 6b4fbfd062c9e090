"""Health, metrics and model information."""

import asyncio
from typing import Annotated
from weakref import WeakKeyDictionary

from fastapi import APIRouter, Query, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from sopdeploy.base.config import StrictModel, count_parts, parse_json
from sopdeploy.bundle.folder import CARD, Bundle
from sopdeploy.bundle.http_api import CardQuery, ModelInfo, PredictedShares, ServerInfo
from sopdeploy.bundle.manifest import CERTIFICATE, EMBEDDING
from sopdeploy_service.api.admission import json_response, service_of
from sopdeploy_service.http.problems import describe_statuses
from sopdeploy_service.inference.model import Model, State

router = APIRouter(tags=["Server"])


class Health(StrictModel):
    """Response of `/livez` and `/readyz`."""

    status: State


class CertificateSummary(StrictModel):
    """A certificate in short: what was compared, removed and kept, and the roots of the graphs.

    `divided_by` is the temperature by which the classifier of the trained network was divided.
    """

    proof: str
    compared: tuple[str, ...]
    detached: tuple[str, ...]
    num_images: int
    num_removed: int
    bytes_removed: int
    num_kept: int
    root: str
    onnx_root: str
    num_operations: int
    divided_by: float | None = None


MAX_SHOWN_LABELS = 100
# JSON values; a larger certificate is not summarized, because parsing it would hold up other requests.
MAX_CERTIFICATE_PARTS = 200_000


class Card(StrictModel):
    """The model card as Markdown, and the certificate in short.

    The text is empty if the bundle has no card. The certificate is null if it is missing, too
    large, or of another structure. `labels` are the names of the first 100 classes.
    """

    bundle: str
    text: str
    labels: tuple[str, ...]
    certificate: CertificateSummary | None


_cards: WeakKeyDictionary[Model, Card] = WeakKeyDictionary()  # kept once it is made


@router.get("/livez", summary="Liveness", response_model=Health)
async def livez(request: Request) -> Response:
    """Return status 200, or 503 if the runtime is dead and the process must be restarted."""
    state = service_of(request).state
    return json_response(Health(status=state), status=503 if state == "runtime_dead" else 200)


@router.get("/readyz", summary="Readiness", response_model=Health)
async def readyz(request: Request) -> Response:
    """Return status 200 if the server accepts images, else 503; `status` says why.

    The probes of every bundle are replayed before the server starts to listen.
    """
    state = service_of(request).state
    return json_response(Health(status=state), status=200 if state == "ok" else 503)


@router.get("/metrics", summary="Prometheus metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    """Return the metrics of all processes of this server."""
    return Response(
        await service_of(request).metrics_page.get(), media_type=CONTENT_TYPE_LATEST
    )


@router.get("/info", summary="Served models", response_model=ServerInfo)
@router.get("/v1/status", summary="Served models, as `/info`", response_model=ServerInfo)
async def info(request: Request) -> Response:
    """Describe each model and its runtime; tell the number of front ends."""
    service = service_of(request)
    models: list[ModelInfo] = []
    for model in service.registry.models():
        manifest = model.bundle.manifest
        runtime = model.runtime
        thresholds = model.decision.thresholds
        rejection = model.decision.rejection
        shapes = {output.name: output.shape for output in manifest.outputs}
        last_day: PredictedShares | None = None
        days_before: PredictedShares | None = None
        # Of several processes, each knows only what itself has predicted.
        if not model.decision.is_multi_label and service.num_servers == 1:
            last_day, days_before = service.metrics.shares.describe(model.name, model.version)

        models.append(
            ModelInfo(
                name=model.name,
                bundle=model.bundle_name,
                id=model.version,
                model=manifest.model,
                num_labels=len(model.labels),
                precision=manifest.precision,
                preprocess=manifest.preprocess,
                runtime=runtime.name,
                device=runtime.device,
                largest_batch=runtime.largest_batch,
                versions=manifest.versions,
                thresholds=None
                if thresholds is None
                else dict(zip(model.labels, thresholds, strict=True)),
                embedding_size=shapes[EMBEDDING][-1] if EMBEDDING in shapes else None,
                known_from=None if rejection is None else rejection.threshold,
                temperature=model.decision.temperature
                if model.decision.divides_logits
                else None,
                last_day=last_day,
                days_before=days_before,
            )
        )

    info = ServerInfo(
        server=request.app.version,
        models=tuple(models),
        front_ends=service.num_front_ends,
        keeps=service.keep is not None,
    )
    return json_response(info)


@router.get(
    "/v1/card",
    summary="Model card and certificate",
    response_model=Card,
    responses=describe_statuses(400, 404, 422, 503),
)
async def card(request: Request, query: Annotated[CardQuery, Query()]) -> Response:
    """Return the model card of `model` (required if there are several) and a summary of its certificate."""
    model = service_of(request).registry.find(query.model)
    if model not in _cards:
        _cards[model] = await asyncio.to_thread(read_card, model.bundle)
    return json_response(_cards[model])


def read_card(bundle: Bundle) -> Card:
    """Read the model card and summarize the certificate of *bundle*."""
    # Summarize the certificate, if it is there, short enough, and of the structure known here.
    try:
        content = bundle.contents[CERTIFICATE]
        if count_parts(content) > MAX_CERTIFICATE_PARTS:
            raise ValueError("too large")
        certificate = parse_json(content)
        roots = certificate["roots"]
        scaling = bundle.manifest.temperature_scaling
        copied = ("proof", "compared", "detached", "num_images")
        summary = CertificateSummary(
            **{name: certificate[name] for name in copied},
            num_removed=len(certificate["removed"]),
            bytes_removed=sum(entry["bytes"] for entry in certificate["removed"]),
            num_kept=len(certificate["kept"]),
            root=roots["any_batch"],
            onnx_root=roots["onnx"],
            num_operations=roots["num_operations"],
            divided_by=None if scaling is None else scaling.temperature,
        )
    except (KeyError, TypeError, ValueError):
        summary = None

    text = bundle.contents.get(CARD, b"").decode("utf-8", "replace")
    labels = bundle.labels[:MAX_SHOWN_LABELS]
    return Card(bundle=bundle.name, text=text, labels=labels, certificate=summary)
