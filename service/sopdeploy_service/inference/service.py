"""Everything behind the HTTP layer: admission, decoders, and what becomes of each image.

An image is admitted or rejected, decoded in a child process, and run by its model in a batch
with others (`Service._predict`). An invalid image never shares a batch with the images of other
requests.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from prometheus_client import generate_latest

from sopdeploy.bundle.decision import Answer
from sopdeploy.errors import ImageError
from sopdeploy.images.occlusion import GRID, occlude
from sopdeploy_service.inference import results
from sopdeploy_service.inference.decoders import DecodedImage, Decoders, upload_budget
from sopdeploy_service.inference.model import Model, Registry, State
from sopdeploy_service.inference.pace import check_time, retry_after
from sopdeploy_service.inference.results import HttpError, Outcome, Prediction, RejectedError
from sopdeploy_service.inference.uploads import Uploads
from sopdeploy_service.observability.busy import measure_loop
from sopdeploy_service.observability.pages import Shared
from sopdeploy_service.settings import (
    DECODERS_BESIDE_CPU_INFERENCE,
    Settings,
    decoders_per_process,
)

# A request none of whose images has another outcome is refused as a whole.
UNANSWERED = {one.code for one in (results.DEADLINE, results.TOO_LATE, results.DECODERS_BUSY)}
PARSERS = 2  # threads; a JSON parser holds the interpreter lock

Images: TypeAlias = Sequence[bytes] | NDArray[np.uint8]


class Traffic(NamedTuple):
    """Marks images of clients, which may be kept.

    *reported* is the class that a person suggests after a wrong answer, or "" without a
    suggestion; None if no answer is reported.
    """

    reported: str | None = None


# Keeps an image if it is worth a label; the text is the class of `Traffic.reported`.
KeepImage: TypeAlias = Callable[[Model, bytes, Prediction, str | None], None]


class Service:
    """Runs inference from `start` to `stop`, once. Every method is called on the event loop."""

    def __init__(self, registry: Registry, settings: Settings) -> None:
        """Serve the models of *registry*."""
        self.settings = settings
        self.registry = registry
        self.metrics = registry.metrics
        self.active_requests = 0  # counted by the middleware
        # Replaced by the page of all processes, if the server has several.
        self.metrics_page = Shared(self.make_metrics)
        self.num_front_ends = 0  # set if the server has several processes
        self.keep: KeepImage | None = None  # set by the app if it keeps photographs

        self.parsers = ThreadPoolExecutor(PARSERS, thread_name_prefix="parser")
        # The number of images without an outcome. A request that is not parsed yet counts as
        # one image. Processes tell each other in cells of shared memory, which `share_admitted`
        # gives.
        self._admitted = 0
        self._cells = memoryview(bytearray(8)).cast("q")
        self._position = 0  # the cell of this process

        # What is limited: the bytes of bodies, the children that decode.
        self.uploads = Uploads(upload_budget(settings))
        self.decoders = Decoders(self._choose_num_decoders(), settings, self.metrics)
        self.metrics.queue_depth.set_function(lambda: self.admitted)
        self.metrics.images_running.set_function(self._count_running)
        self.metrics.images_waiting.set_function(self._count_waiting)
        self.metrics.upload_bytes.set_function(lambda: self.uploads.num_bytes)
        self.metrics.ready.set_function(lambda: self.state == "ok")
        limits = {
            "images": settings.queue_size,
            "connections": settings.max_connections,
            "upload_bytes": self.uploads.budget,
        }
        for name, limit in limits.items():
            self.metrics.limit.labels(name).set(limit)

        self._is_started = False
        self._measuring: asyncio.Task[None] | None = None  # the event loop
        self._is_leaving = False  # not ready any more, but serves
        self._draining = False

    async def make_metrics(self) -> bytes:
        """Return the page with the metrics of this process, which a thread makes."""
        for model in self.registry.models():
            if not model.decision.is_multi_label:
                self.metrics.create_predictions(
                    model.name,
                    model.version,
                    model.labels,
                    rejects=model.decision.rejection is not None,
                )
        return await asyncio.to_thread(generate_latest, self.metrics.registry)

    def _count_running(self) -> int:
        """Count the images that decoders or batches of this process have."""
        decoders = self.decoders
        num_decoding = decoders.light.num_running + decoders.large.num_running
        return num_decoding + self.registry.num_running

    def _count_waiting(self) -> int:
        """Count the other admitted images; a device process counts those that it has."""
        return max(0, self.admitted - self._count_running() - self.registry.num_sent)

    @property
    def admitted(self) -> int:
        """The images that this process has admitted and not answered."""
        return self._admitted

    @admitted.setter
    def admitted(self, count: int) -> None:
        self._admitted = self._cells[self._position] = count

    def share_admitted(self, cells: "memoryview[int]", position: int) -> None:
        """Count in *cells*, one per process of the server; that of this one, at *position*, is set to 0."""
        self._cells = cells
        self._position = position
        self.admitted = 0

    @property
    def num_servers(self) -> int:
        """How many processes of the server serve HTTP."""
        return len(self._cells)

    def _count_admitted(self) -> int:
        """Return the images of all processes."""
        return sum(self._cells)

    def _choose_num_decoders(self) -> int:
        """Return the largest number of children for light images, if the server has no other process."""
        if self.settings.decoders != "auto":
            return self.settings.decoders

        if all(model.runtime.device == "cpu" for model in self.registry.models()):
            return DECODERS_BESIDE_CPU_INFERENCE
        return decoders_per_process(1)

    @property
    def state(self) -> State:
        """The health: `ok`, or why the server is not ready."""
        problem = self.registry.problem

        # A dead runtime counts most: nothing can be drained.
        if problem != "runtime_dead":
            if self._is_leaving:
                return "draining"
            if not self._is_started:
                return "starting"
        return problem or "ok"

    async def start(self) -> None:
        """Start the threads and accept requests."""
        await self.registry.start()
        await self.decoders.start()
        self._measuring = asyncio.create_task(measure_loop(self.metrics.loop_busy))
        self._is_started = True

    def leave(self) -> None:
        """Stop to be ready, so that proxies send no more requests; those that come are served."""
        self._is_leaving = True

    def drain(self, *, abort: bool = False) -> None:
        """Reject new requests; finish those already admitted or, with *abort*, reject them, too."""
        self._is_leaving = self._draining = True
        if abort:
            self.registry.close(results.DRAINING)

    async def stop(self) -> None:
        """End the threads."""
        self.drain(abort=True)
        if self._measuring is not None:
            self._measuring.cancel()
        await self.decoders.stop()
        self.parsers.shutdown(wait=False, cancel_futures=True)
        await self.registry.stop()

    def check_admission(self, model: Model, deadline: float) -> None:
        """Raise `RejectedError` if a request, not yet read, cannot be admitted or meet its *deadline*."""
        if model.is_down:
            raise RejectedError(results.RUNTIME_DEAD)
        if self._draining:
            raise RejectedError(results.DRAINING)
        if not self._is_started:
            raise RejectedError(results.STARTING)

        self.check_queue(model, 1, deadline)

    def check_queue(self, model: Model, num_images: int, deadline: float) -> None:
        """Raise `RejectedError` if the queue has no room for *num_images* images, or they miss *deadline*."""
        if self._count_admitted() + num_images > self.settings.queue_size:
            seconds = self._seconds_to_response(model, 0)
            raise RejectedError(retry_after(results.QUEUE_FULL, seconds))

        # A request that is alone is always admitted. Otherwise, an estimate that is too high
        # would reject every request, and none would correct it.
        if self._count_earlier(model):
            seconds = self._seconds_to_response(model, num_images)
            refusal = check_time(seconds, deadline)
            if refusal is not None:
                raise RejectedError(refusal)

    def _seconds_to_response(self, model: Model, num_images: int) -> float:
        """Estimate the seconds until *num_images* more images have been answered; with 0, those admitted."""
        decoders = self.decoders.light
        decoding = decoders.wait_seconds(group=None) + decoders.pace.seconds

        num_batched = self._count_earlier(model) + num_images
        batches = model.pace.total_seconds(num_batched, model.largest_batch)

        # Images are decoded while others run.
        return max(decoding + model.pace.batch_seconds(1), batches)

    def _count_earlier(self, model: Model) -> int:
        """Estimate how many admitted images run before the next one of *model*, on the same device."""
        # Device processes share the images of all front ends, which have about as many each as this one.
        if self.num_front_ends:
            about = self.admitted * self.num_servers
            return min(about, self._count_admitted()) // model.num_devices

        return self.admitted  # each process has a device of its own

    async def infer(
        self,
        model: Model,
        images: Images,
        deadline: float,
        *,
        client: str = "",
        features: bool = False,
        traffic: Traffic | None = None,
    ) -> list[Outcome]:
        """Run *model*, which must be in use, on encoded images or on a tensor (n, H, W, 3) uint8.

        Returns the outcome of each image, in order. *deadline* is a time of `time.monotonic`,
        *client* the key or address that shares the decoders for large images; *features*
        requests the embedding. Only with *traffic*, images may be kept.
        Cancelling the call removes its images from the queue; call `check_queue` before.
        Raises `RejectedError` if all images miss the deadline or find too many others waiting
        for a decoder.
        """
        # Decode and run the images, each on its own. They count as admitted until they have
        # outcomes.
        predict = partial(
            self._predict,
            model,
            deadline,
            client=client,
            features=features,
        )

        self.admitted += len(images)
        try:
            if len(images) == 1:  # without a task of its own
                outcomes = [await predict(images[0])]
            else:
                outcomes = await asyncio.gather(*map(predict, images))
        finally:
            self.admitted -= len(images)

        # An image that is late or finds no decoder fails alone, beside others that have an answer.
        unanswered = [
            one for one in outcomes if isinstance(one, HttpError) and one.code in UNANSWERED
        ]
        if unanswered and len(unanswered) == len(outcomes):
            raise RejectedError(unanswered[0])

        # Images that clients have sent encoded may be kept.
        if traffic is not None and self.keep is not None:
            for image, outcome in zip(images, outcomes, strict=True):
                if isinstance(outcome, Prediction) and isinstance(image, bytes):
                    self.keep(model, image, outcome, traffic.reported)
        return outcomes

    def count_answer(self, model: Model, answer: Answer) -> None:
        """Count the *answer* of *model*; with several classes per image, none is the most probable one."""
        if not model.decision.is_multi_label:
            self.metrics.count_prediction(model.name, model.version, model.labels, answer)

    async def _predict(
        self,
        model: Model,
        deadline: float,
        image: bytes | NDArray[np.uint8],
        *,
        client: str,
        features: bool,
    ) -> Outcome:
        """Decode *image*, unless it is pixels already, and run *model* on it."""
        try:
            # Decode an encoded image; a tensor has pixels already.
            stages: dict[str, float] = {}
            if isinstance(image, bytes):
                rules = model.bundle.manifest.preprocess
                decoded = await self.decoders.decode(
                    image, rules, deadline, client, model.pace.batch_seconds(1)
                )
                stages |= decoded.stage_seconds
                for stage, seconds in decoded.stage_seconds.items():
                    self.metrics.observe_stage(stage, seconds)
            else:
                decoded = DecodedImage(image, (), {})

            # Run the pixels in a batch with those of other requests.
            ran = await model.run(decoded.pixels, deadline, features=features)
            stages |= ran.stage_seconds

            return Prediction(ran.outputs, stages, decoded.pixels, decoded.warnings)
        except ImageError as error:
            return HttpError.from_image_error(error)
        except RejectedError as error:
            return error.reason

    async def explain(
        self, model: Model, images: Images, deadline: float, client: str = ""
    ) -> list[Outcome]:
        """Run `infer`, then run it on occluded copies of each image; add their logits to its `Prediction`.

        An image gets the error of its first copy that fails. The images may be kept, their
        copies not. The copies count as admitted from the start, so that they find room in the
        queue.
        """
        # Run `infer` on the images, with room in the queue for their copies.
        num_copies = GRID**2
        self.admitted += num_copies * len(images)
        try:
            outcomes = await self.infer(
                model, images, deadline, client=client, traffic=Traffic()
            )
        finally:  # nothing is awaited before the second `infer`, which counts its copies itself
            self.admitted -= num_copies * len(images)

        predictions = [outcome for outcome in outcomes if isinstance(outcome, Prediction)]
        if not predictions:
            return outcomes

        # Run the occluded copies of every image that has a prediction, all at once.
        started = time.monotonic()
        rules = model.bundle.manifest.preprocess
        copies = np.concatenate(
            [occlude(prediction.pixels, rules) for prediction in predictions]
        )
        outcomes_of_copies = await self.infer(model, copies, deadline)
        seconds = time.monotonic() - started

        # Each prediction takes the outcomes of its copies, in order.
        remaining = iter(outcomes_of_copies)
        explained: list[Outcome] = []
        for outcome in outcomes:
            if isinstance(outcome, Prediction):
                of_copies = list(itertools.islice(remaining, num_copies))
                outcome = _add_copies(outcome, of_copies, model.logits_name, seconds)
            explained.append(outcome)
        return explained


def _add_copies(
    prediction: Prediction, copies: Sequence[Outcome], logits_name: str, seconds: float
) -> Outcome:
    """Add the logits of occluded *copies*, which took *seconds*; return the error of the first that failed."""
    logits = []
    for copy in copies:
        if isinstance(copy, HttpError):
            return copy
        logits.append(copy.outputs[logits_name])

    stages = {**prediction.stage_seconds, "explain": seconds}
    return prediction._replace(stage_seconds=stages, occluded=np.array(logits))
