"""A second model that gets a share of the requests; no response contains or waits for its outputs.

After a response is computed, the decoded images of the request wait here. One image at a time runs through
the shadow while the live model has nothing to run. At most `MAX_WAITING` images wait; more are dropped. If
the two bundles preprocess images in the same way, the shadow gets the same pixels, otherwise the decoders
decode the file again.
"""

import asyncio
import hashlib
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sopdeploy.decision import Decision
from sopdeploy.errors import ConfigError, shorten
from sopdeploy_service.images.decode import EncodedImage
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.model_worker import QueuedImage
from sopdeploy_service.inference.results import Outcome, Prediction, Rejection, present_classes
from sopdeploy_service.observability.metrics import ShadowMetrics

MAX_WAITING = 32  # images
MAX_WAITING_BYTES = 32_000_000

Image = EncodedImage | NDArray[np.uint8]
Submit = Callable[[Model, QueuedImage, Image], None]  # queues an image at a model, decoding it first


@dataclass(frozen=True, slots=True)
class ShadowPlan:
    """The shadow *loaded*, called *name*, gets the *share* of the requests to the model *live*."""

    name: str
    share: float
    live: str
    loaded: LoadedModel


def plan_shadow(shadow: str | None, models: Mapping[str, LoadedModel]) -> ShadowPlan | None:
    """Find the model of the setting *shadow*, `NAME=SHARE`, among *models* and the one it shadows.

    Raises `ConfigError` unless there are exactly two models, with the same classes.
    """
    if shadow is None:
        return None
    name, _, share = shadow.partition("=")
    others = sorted(set(models) - {name})
    if name not in models or len(others) != 1:
        listed = shorten(sorted(models)) or "none"
        raise ConfigError(
            f"shadow {name}: needs the bundle {name}=PATH and one other bundle; the bundles here are {listed}"
        )
    bundles = [models[one].bundle for one in (name, *others)]
    if len({frozenset(bundle.labels) for bundle in bundles}) > 1:
        raise ConfigError(
            f"shadow {name}: its classes differ from those of {others[0]}; use bundles with the same classes"
        )
    if len({(bundle.manifest.decision or Decision()).activation for bundle in bundles}) > 1:
        raise ConfigError(
            f"shadow {name}: only one of {name} and {others[0]} has several classes per image"
            "; use bundles of the same kind"
        )
    return ShadowPlan(name, float(share), others[0], models[name])


@dataclass(frozen=True, eq=False, slots=True)
class _Waiting:
    """An image, and the *outcome* of *model* for it."""

    image: Image
    size: int
    model: Model
    outcome: Prediction


class Shadow:
    """Compares *model* with the live model; every method is called on the event loop."""

    def __init__(
        self,
        plan: ShadowPlan,
        model: Model,
        metrics: ShadowMetrics,
        *,
        is_idle: Callable[[], bool],
        submit: Submit,
    ) -> None:
        """Run images of *plan* through *model* while *is_idle*; *submit* queues an image at it."""
        self.plan = plan
        self.model = model
        self.metrics = metrics
        self._is_idle = is_idle
        self._submit = submit
        self._waiting: deque[_Waiting] = deque()
        self._waiting_bytes = 0
        self._running: asyncio.Future[Outcome] | None = None
        self._ended = False

    def samples(self, model: Model, request_id: str) -> bool:
        """Tell whether the request *request_id* to *model* also goes to the shadow.

        The hash of the id decides, so a repeated request gets the same answer.
        """
        if model.name != self.plan.live or self._ended:
            return False
        digest = hashlib.blake2b(request_id.encode(), digest_size=4).digest()
        return int.from_bytes(digest) < self.plan.share * 2**32

    def offer(
        self,
        model: Model,
        items: Sequence[QueuedImage],
        images: Sequence[EncodedImage] | NDArray[np.uint8],
        outcomes: Sequence[Outcome],
    ) -> None:
        """Queue the *images* of a request that *model* has predicted; drop images beyond `MAX_WAITING`.

        *items* have the decoded pixels. Images that the live model rejects are not compared.
        """
        same = model.bundle.manifest.preprocess == self.model.bundle.manifest.preprocess
        for item, image, outcome in zip(items, images, outcomes, strict=True):
            if not isinstance(outcome, Prediction):
                continue
            used: Image = item.image if same else image
            size = len(used.body) if isinstance(used, EncodedImage) else used.nbytes
            fits = same or isinstance(used, EncodedImage)  # a tensor has the size of the live model's input
            full = len(self._waiting) >= MAX_WAITING or self._waiting_bytes + size > MAX_WAITING_BYTES
            if full or not fits or self.model.dead:
                self.metrics.count("dropped")
                continue
            self._waiting.append(_Waiting(used, size, model, outcome))
            self._waiting_bytes += size

    def advance(self) -> None:
        """Begin the next image if the live model is idle; call it after every event that can make it idle."""
        if self._running is not None or not self._waiting or self._ended or not self._is_idle():
            return
        entry = self._waiting.popleft()
        self._waiting_bytes -= entry.size
        item = QueuedImage(outcome=asyncio.get_running_loop().create_future(), deadline=math.inf)
        self._running = item.outcome
        item.outcome.add_done_callback(lambda done: self._compare(entry, done.result()))
        self._submit(self.model, item, entry.image)

    async def end(self) -> LoadedModel | None:
        """Stop comparing; return the bundle with its runtime, which nothing uses any more.

        Returns None if the model has failed.
        """
        self._ended = True
        self._waiting.clear()
        if self._running is not None:
            await asyncio.wait([self._running])
        await self.model.stop(keep_runtime=True)
        return None if self.model.dead else self.plan.loaded

    def _compare(self, entry: _Waiting, outcome: Outcome) -> None:
        self._running = None
        if self._ended:
            return
        if isinstance(outcome, Rejection):
            self.metrics.count("failed")
        else:
            equal = _predicted(self.model, outcome) == _predicted(entry.model, entry.outcome)
            self.metrics.count("agree" if equal else "differ")
            self.metrics.observe(live=entry.outcome.infer_seconds, shadow=outcome.infer_seconds)
        self.advance()


def _predicted(model: Model, outcome: Prediction) -> set[str]:
    """Return the label of the best class; for several classes per image, those of all present classes."""
    logits = outcome.outputs[model.bundle.manifest.outputs[0].name]
    if model.thresholds is None:
        return {model.labels[int(logits.argmax())]}
    return {model.labels[index] for index, _ in present_classes(logits, model.thresholds)}
