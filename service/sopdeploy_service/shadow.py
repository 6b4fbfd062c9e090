"""A second model, the shadow, that gets a share of the requests; no response depends on it.

After a response is computed, the decoded images of the request wait here. One image at a time runs through
the shadow while the live model has nothing to run. At most `MAX_WAITING_IMAGES` wait; more are dropped. If
the two bundles preprocess images in the same way, the shadow gets the same pixels, otherwise the decoders
decode the file again.
"""

import asyncio
import hashlib
import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from numpy.typing import NDArray

from sopdeploy.decision import Decision
from sopdeploy.errors import ConfigError, shorten
from sopdeploy.http_api import ModelInfo, ShadowInfo
from sopdeploy_service.api.admission import json_response, service_of, use_model
from sopdeploy_service.api.status import model_info
from sopdeploy_service.http.middleware import require_admin
from sopdeploy_service.http.problems import problem_responses
from sopdeploy_service.images.decode import EncodedImage
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.model_worker import QueuedImage
from sopdeploy_service.inference.registry import NOT_CONTROLLED
from sopdeploy_service.inference.results import HttpError, Outcome, Prediction, RejectedError, rank_classes
from sopdeploy_service.inference.service import ObservedRequest, Service
from sopdeploy_service.keep import Keeper

MAX_WAITING_IMAGES = 32  # images
MAX_WAITING_BYTES = 32_000_000

Image = EncodedImage | NDArray[np.uint8]

router = APIRouter()


def serve_shadow(app: FastAPI, service: Service) -> None:
    """Add the route that promotes a shadow to *app* and, if the settings name one, the shadow to *service*.

    Raises `ConfigError` for a shadow that is not among the models or has other classes.
    """
    app.router.routes += router.routes
    app.state.shadow = None
    if service.settings.shadow is not None:
        name, _, share = service.settings.shadow.partition("=")
        live = find_live_model(service.registry.models(), name)
        shadow = app.state.shadow = Shadow(service, name, live, float(share), app.state.keeper)
        service.observers.append(shadow.observe)
        service.more_info["shadow"] = shadow.info


@router.post(
    "/v1/models/{name}/promote",
    summary="Serve the shadow",
    response_model=ModelInfo,
    responses=problem_responses(401, 403, 404, 409, 422),
    dependencies=[Depends(require_admin)],
)
async def promote(request: Request, name: str) -> Response:
    """Serve the shadow *name* under the name of the live model; a rollback of that model undoes it."""
    service = service_of(request)
    if not service.settings.model_control:
        raise RejectedError(NOT_CONTROLLED)
    shadow: Shadow | None = request.app.state.shadow
    if shadow is None or shadow.name != name:
        raise RejectedError(HttpError("no_shadow", 409, f"{name[:100]!r}: is not the shadow of a model"))
    if shadow.model.dead:
        message = f"{name}: the model worker of this shadow has stopped"
        raise RejectedError(HttpError("shadow_failed", 409, message))
    request.app.state.shadow = None
    return json_response(model_info(use_model(request.state.context, await shadow.promote())))


def find_live_model(models: Sequence[Model], name: str) -> str:
    """Return the name of the model whose requests the shadow *name* gets.

    Raises `ConfigError` unless *models* are exactly this one and the shadow, with the same classes.
    """
    bundles = {model.name: model.bundle for model in models}
    shadow = bundles.pop(name, None)
    if shadow is None or len(bundles) != 1:
        listed = shorten(sorted(model.name for model in models)) or "none"
        raise ConfigError(
            f"shadow {name}: needs the bundle {name}=PATH and one other bundle; the bundles here are {listed}"
        )
    ((live, bundle),) = bundles.items()
    if set(shadow.labels) != set(bundle.labels):
        raise ConfigError(
            f"shadow {name}: its classes differ from those of {live}; use bundles with the same classes"
        )
    kinds = {(each.manifest.decision or Decision()).activation for each in (shadow, bundle)}
    if len(kinds) > 1:
        raise ConfigError(
            f"shadow {name}: only one of {name} and {live} has several classes per image"
            "; use bundles of the same kind"
        )
    return live


class _Waiting(NamedTuple):
    """An image, its bytes in memory, and the *prediction* of the *live* model for it.

    *to_keep* is what the client sent and what the live model got, to keep if both disagree.
    """

    image: Image
    bytes: int
    live: Model
    prediction: Prediction
    to_keep: tuple[EncodedImage, NDArray[np.uint8]] | None


class Shadow:
    """Compares the model *name* with the model *live* for a *share* of the requests.

    Every method is called on the event loop.
    """

    def __init__(
        self, service: Service, name: str, live: str, share: float, keeper: Keeper | None = None
    ) -> None:
        """Hide the model *name* from clients of *service*: it gets only images that *live* predicted.

        The *keeper* gets the photographs on which both disagree.
        """
        self.name, self._live, self._share, self._keeper = name, live, share, keeper
        self._service = service
        self.model = service.registry.hide(name)
        metrics = service.metrics
        self.counts = dict.fromkeys(("agree", "differ", "failed", "dropped"), 0)
        self._images = {result: metrics.shadow_images.labels(name, result) for result in self.counts}
        self._seconds = {side: metrics.shadow_seconds.labels(name, side) for side in ("live", "shadow")}
        self._waiting: deque[_Waiting] = deque()
        self._running: asyncio.Future[Outcome] | None = None

    def info(self) -> ShadowInfo:
        """Describe the shadow for `/info`."""
        bundle = self.model.bundle
        return ShadowInfo(
            name=self.name,
            bundle=bundle.name,
            id=bundle.manifest.id,
            live=self._live,
            share=self._share,
            images=self.counts,
        )

    def observe(self, request: ObservedRequest) -> None:
        """Queue the images of a *request* to the live model if the request is sampled."""
        if request.model.name == self._live and self.samples(request.context.request_id):
            self._offer(request)
        asyncio.get_running_loop().call_soon(self._advance)  # after the response

    def samples(self, request_id: str) -> bool:
        """Tell whether the request *request_id* to the live model also goes to the shadow.

        The hash of the id decides, so a repeated request gets the same answer.
        """
        digest = hashlib.blake2b(request_id.encode(), digest_size=4).digest()
        return int.from_bytes(digest) < self._share * 2**32

    async def promote(self) -> Model:
        """Serve the shadow instead of the live model, which stays loaded for a rollback."""
        self._service.observers.remove(self.observe)
        del self._service.more_info["shadow"]
        self._waiting.clear()
        return await self._service.registry.promote(self.name, self._live)

    def _offer(self, request: ObservedRequest) -> None:
        """Queue the images that the live model has predicted; drop images beyond `MAX_WAITING_IMAGES`.

        Images that the live model rejects are not compared. Files that may be kept wait, too.
        """
        live, may_keep = request.model, self._keeper is not None and request.context.may_keep
        same_preprocess = live.bundle.manifest.preprocess == self.model.bundle.manifest.preprocess
        for image, pixels, prediction in request.predicted():
            offered: Image = pixels if same_preprocess else image
            to_keep = (image, pixels) if may_keep and isinstance(image, EncodedImage) else None
            in_memory = to_keep or (offered,)  # *offered* is one of *to_keep*
            size = sum(
                len(each.body) if isinstance(each, EncodedImage) else each.nbytes for each in in_memory
            )
            waiting_bytes = sum(entry.bytes for entry in self._waiting)
            full = len(self._waiting) >= MAX_WAITING_IMAGES or waiting_bytes + size > MAX_WAITING_BYTES
            # A tensor in a request is preprocessed for the live model.
            unfit = not same_preprocess and not isinstance(image, EncodedImage)
            if full or unfit or self.model.dead:
                self._count("dropped")
            else:
                self._waiting.append(_Waiting(offered, size, live, prediction, to_keep))

    def _advance(self) -> None:
        """Begin the next image if the live model is idle; call it after every event that can make it idle."""
        if self._running is not None or not self._waiting or not self._service.registry.is_idle:
            return
        entry = self._waiting.popleft()
        item = QueuedImage(outcome=asyncio.get_running_loop().create_future(), deadline=math.inf)
        self._running = item.outcome
        item.outcome.add_done_callback(lambda done: self._compare(entry, done.result()))
        self._service.submit(self.model, item, entry.image)

    def _compare(self, entry: _Waiting, outcome: Outcome) -> None:
        self._running = None
        if isinstance(outcome, HttpError):
            self._count("failed")
        else:
            equal = _predicted(self.model, outcome) == _predicted(entry.live, entry.prediction)
            self._count("agree" if equal else "differ")
            if not equal and self._keeper is not None and entry.to_keep is not None:
                self._keeper.offer(entry.live, *entry.to_keep, entry.prediction, "disagreement")
            self._seconds["live"].observe(entry.prediction.infer_seconds)
            self._seconds["shadow"].observe(outcome.infer_seconds)
        self._advance()

    def _count(self, result: str) -> None:
        self.counts[result] += 1
        self._images[result].inc()


def _predicted(model: Model, prediction: Prediction) -> set[str]:
    """Return the label of the best class; for several classes per image, those of all present classes."""
    logits = prediction.outputs[model.bundle.manifest.outputs[0].name]
    top_k = 1 if model.thresholds is None else None
    (ranked,) = rank_classes(logits[None], top_k, model.thresholds)
    return {model.labels[index] for index, _ in ranked}
