"""The delay of the request queue, isolation of images that make a batch fail, and two batches on a device."""

import asyncio
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from sopdeploy.bundle.probes import Probes, read_probes
from sopdeploy.errors import ParityError
from sopdeploy_service.inference import loader, model_worker
from sopdeploy_service.inference.loader import LoadedModel, replay_overlapping, warm_up
from sopdeploy_service.inference.model_worker import LocalModel, run_bisected
from sopdeploy_service.inference.request_queue import QueuedImage, RequestQueue
from sopdeploy_service.inference.results import INFERENCE_FAILED, OUT_OF_MEMORY, HttpError
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.runtime.base import DeviceLostError, OutOfMemoryError
from sopdeploy_service.settings import Settings
from tests.support.fake_runtime import FakeOverlappingRuntime, FakeRuntime
from tests.support.raw import connect, count, post_of
from tests.support.runtimes import Held
from tests.support.service import picture_bytes, wait_for


def fill(queue: RequestQueue, count: int) -> list[QueuedImage]:
    """Put *count* images into *queue* and return them."""
    deadline = time.monotonic() + 60
    items = [
        QueuedImage(image, deadline, lambda _result: None) for image in images(*range(count))
    ]
    for item in items:
        queue.put(item)
    return items


def test_a_batch_has_the_images_that_are_queued() -> None:
    queue = RequestQueue()
    assert queue.take(4, only_full=True) == []
    items = fill(queue, 4)
    assert queue.take(5, only_full=True) == []
    assert queue.take(2, only_full=True) == items[:2]
    assert queue.take(2) == items[2:]

    items = fill(queue, 2)
    assert queue.take(8) == items
    late = threading.Timer(0.05, fill, (queue, 1))
    late.start()
    assert len(queue.take(3)) == 1  # an empty queue waits for the first one
    late.join()


RAISES = 13


def images(*first: int) -> list[np.ndarray]:
    return [np.full((2, 2, 3), value, np.uint8) for value in first]


@pytest.mark.parametrize(
    ("size", "bad"),
    [(1, []), (33, []), (1, [0]), (2, [1]), (7, [3]), (64, [32]), (64, [3, 60])],
)
def test_bad_images_fail_alone_and_a_good_batch_takes_one_run(
    size: int, bad: list[int]
) -> None:
    runs: list[int] = []

    def network(images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        runs.append(len(images))
        first = np.array([image[0, 0] for image in images], np.float32)
        if (first == RAISES).any():
            raise RuntimeError("a bad image")
        return {"logits": first}

    values = [RAISES if index in bad else 20 + index for index in range(size)]
    found = run_bisected(network, images(*values), ["logits"])
    assert [index for index, row in enumerate(found) if row is INFERENCE_FAILED] == bad
    good = [index for index in range(size) if index not in bad]
    assert [found[index]["logits"][0] for index in good] == [values[index] for index in good]
    assert (runs == [size]) == (size == 1 or not bad)


ERRORS = [
    (OutOfMemoryError(), OUT_OF_MEMORY),
    (
        MemoryError("Unable to allocate 4.00 GiB for an array with shape (64, 4096)"),
        OUT_OF_MEMORY,
    ),
    (MemoryError(), OUT_OF_MEMORY),
    (RuntimeError("a bad image"), INFERENCE_FAILED),
]


@pytest.mark.parametrize(("error", "reason"), ERRORS)
def test_an_image_for_which_memory_is_missing_may_be_sent_again(
    error: Exception, reason: HttpError
) -> None:
    def network(_images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        raise error

    assert run_bisected(network, images(1, 2), ["logits"]) == [reason, reason]


@pytest.mark.parametrize("pause", [0.0, 1000.0])
def test_a_hung_batch_is_judged_by_the_time_its_process_ran(bundle, monkeypatch, pause) -> None:
    loaded = LoadedModel(bundle=bundle, runtime=FakeRuntime(num_classes=7), replays={})
    model = LocalModel("tiny", loaded, Settings(), Metrics())
    now = [100.0]
    pauses = [0.0, pause]

    async def sleep(seconds: float) -> None:
        now[0] += seconds + (pauses.pop() if pauses else 0.0)

    monkeypatch.setattr(model_worker, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(model_worker.asyncio, "sleep", sleep)
    model._in_flight = [model_worker._Batch([])]
    model._batch_started = now[0]
    asyncio.run(model._watch())
    assert model.is_down
    assert 4 < now[0] - 100 - pause < 6


MAX_BATCH = 2
COLORS = [
    (250, 10, 10),
    (10, 250, 10),
    (10, 10, 250),
    (250, 250, 10),
    (10, 250, 250),
    (250, 10, 250),
]


class Scripted(FakeOverlappingRuntime):
    """Records the order of calls; a batch ends when `gate` is set.

    *errors* has exceptions by batch number and by when they are raised: 0 at its begin, 1 at
    its end.
    """

    def __init__(self, errors=None) -> None:
        super().__init__(num_classes=7, largest_batch=MAX_BATCH)
        self.errors = errors or {}
        self.gate = threading.Event()
        self.calls: list[str] = []

    def begin(self, images, names=None):
        number = len(self.batches) + 1
        self.calls.append(f"begin {number}")
        wait = super().begin(images)
        if error := self.errors.get((number, 0)):
            raise error

        def end():
            self.calls.append(f"wait {number}")
            self.gate.wait(60)
            if error := self.errors.get((number, 1)):
                raise error
            return wait()

        return end


@pytest.fixture
def classify(serve_with, pool):
    """`classify(runtime, 5)` sends one image, then four while it runs; returns responses and client."""

    def post(client, image):
        return client.post("/v1/classify?top_k=1", content=image)

    def send(runtime, count):
        client = serve_with(runtime, decoders=1)
        images = [picture_bytes(color) for color in COLORS[:count]]
        futures = [pool.submit(post, client, images[0])]
        wait_for(lambda: "wait 1" in runtime.calls)
        for number, image in enumerate(images[1:], 2):  # keeps the order
            futures.append(pool.submit(post, client, image))
            decoded = f'stage_duration_seconds_count{{stage="decode"}} {number}.0'
            wait_for(lambda decoded=decoded: decoded in client.get("/metrics").text)
        runtime.gate.set()
        return [future.result(60) for future in futures], client

    return send


def test_a_full_batch_begins_while_another_runs_and_a_partial_one_waits(classify):
    runtime = Scripted()
    replies, _ = classify(runtime, 6)

    assert [reply.status_code for reply in replies] == [200] * 6
    assert runtime.batches == [1, 2, 2, 1]
    assert runtime.calls[:2] == ["begin 1", "wait 1"]
    assert runtime.calls[2:] == ["begin 2", "begin 3", "wait 2", "wait 3", "begin 4", "wait 4"]


FAILURES = {"begin": ((2, 0), [1, 2, 2, 2]), "end": ((3, 1), [1, 1, 1, 2, 2])}


@pytest.mark.parametrize("where", FAILURES)
def test_a_failed_batch_begins_again_or_is_halved_alone(classify, where):
    number, batches = FAILURES[where]
    runtime = Scripted({number: RuntimeError("once")})
    replies, _ = classify(runtime, 5)

    assert [reply.status_code for reply in replies] == [200] * 5
    assert sorted(runtime.batches) == batches


def test_a_lost_device_ends_the_model(classify):
    replies, client = classify(Scripted({(2, 1): DeviceLostError("gone")}), 6)

    assert [reply.status_code for reply in replies] == [200] + [503] * 5
    assert client.get("/livez").status_code == 503


class Leaking(FakeOverlappingRuntime):
    """Gives an overlapping batch the outputs of the batch before it."""

    def __init__(self) -> None:
        super().__init__(num_classes=7)
        self.begun = []

    def begin(self, images, names=None):
        self.begun.append(super().begin(images))
        return self.begun[-2] if len(self.begun) % 2 == 0 else self.begun[-1]


def test_a_runtime_that_mixes_up_batches_is_rejected_by_the_probes():
    images = np.full((2, 32, 32, 3), np.arange(2, dtype=np.uint8)[:, None, None, None])
    runtime = FakeOverlappingRuntime(num_classes=7)
    probes = Probes(images=images, expected=runtime.run(images), tolerance={"logits": 1e-3})
    replay_overlapping(probes, runtime, 2)

    with pytest.raises(ParityError, match="deviates by"):
        replay_overlapping(probes, Leaking(), 2)


class WrongFor(FakeRuntime):
    """Spoils the logits of batches for which *is_wrong* of the sizes of all batches so far is true."""

    def __init__(
        self, is_wrong, spoil=lambda logits: np.roll(logits, 1, axis=0), device="cuda:0"
    ) -> None:
        super().__init__(num_classes=7, largest_batch=64, device=device)
        self._is_wrong = is_wrong
        self._spoil = spoil

    def run(self, images):
        logits = super().run(images)["logits"]
        return {"logits": self._spoil(logits) if self._is_wrong(self.batches) else logits}


WRONG = {
    "above 12 images": lambda sizes: sizes[-1] > 12,
    "of 2 images": lambda sizes: sizes[-1] == 2,
    "after a batch that was much larger": lambda sizes: (
        sizes[-2:-1] > [4 * sizes[-1]] and sizes[-1] > 1
    ),
    "after a batch that was much smaller": lambda sizes: (
        len(sizes) > 1 and sizes[-1] > 16 * sizes[-2]
    ),
}


def with_first_row(logits, row):
    return np.concatenate([row[None], logits[1:]])


# Logits of a batch of 2 images or more
SPOILT = {
    "zeros": np.zeros_like,
    "rows of the images beside them": lambda logits: np.roll(logits, 1, axis=0),
    "a first row of zeros": lambda logits: with_first_row(logits, 0 * logits[0]),
    "a first row that is the second one": lambda logits: with_first_row(logits, logits[1]),
    "a second half that is the first one": lambda logits: np.tile(
        logits[: len(logits) // 2], (2, 1)
    ),
}


def mean_probes(num_images: int) -> Probes:
    """Probes of a `FakeRuntime`: images of different grays."""
    grays = 7 + 7 * np.arange(num_images, dtype=np.uint8)[:, None, None, None]
    images = np.full((num_images, 32, 32, 3), grays)
    expected = FakeRuntime(num_classes=7).run(images)
    return Probes(images=images, expected=expected, tolerance={"logits": 1e-3})


@pytest.mark.parametrize("wrong", WRONG)
def test_a_runtime_that_is_wrong_at_one_size_is_rejected(wrong):
    probes = mean_probes(12)
    with pytest.raises(ParityError, match=r"deviates by .* batch"):
        warm_up(probes, WrongFor(WRONG[wrong]), 64)


@pytest.mark.parametrize("num_probes", [2, 12, 16])
@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_runtime_with_wrong_rows_in_its_largest_batch_is_rejected(spoilt, device, num_probes):
    runtime = WrongFor(lambda sizes: sizes[-1] == 2 * num_probes, SPOILT[spoilt], device)
    with pytest.raises(ParityError, match=r"deviates by .* batch"):
        warm_up(mean_probes(num_probes), runtime, 2 * num_probes)


class WrongForOneImage(FakeRuntime):
    """Computes *runtime* on a CPU, except for *image*, in batches of every size."""

    def __init__(self, runtime, image) -> None:
        super().__init__(num_classes=7, device="cpu")
        self._runtime = runtime
        self._image = image

    def run(self, images):
        logits = self._runtime.run(images)["logits"].copy()
        logits[(images == self._image).all(axis=(1, 2, 3))] += 1
        return {"logits": logits}


@pytest.mark.parametrize("max_batch", [1, 2, 8])
@pytest.mark.parametrize("wrong", range(3))
def test_a_runtime_that_is_wrong_for_a_single_probe_is_not_served(
    bundle, onnx_runtime, monkeypatch, wrong, max_batch
):
    probes = read_probes(bundle)
    assert len(probes.images) == 3

    runtime = WrongForOneImage(onnx_runtime, probes.images[wrong])
    monkeypatch.setattr(loader, "open_runtime", lambda *_: runtime)
    with pytest.raises(ParityError, match="deviates by 1"):
        loader.load_model(bundle.path, Settings(max_batch=max_batch))


@pytest.mark.parametrize(("accepted", "passes"), [(1.5, True), (0.5, False), (None, False)])
def test_an_engine_whose_larger_error_was_allowed_is_served(
    bundle, onnx_runtime, monkeypatch, accepted, passes
):
    runtime = WrongForOneImage(onnx_runtime, read_probes(bundle).images[0])
    if accepted is not None:
        runtime.accepted_errors = {"logits": accepted}
    monkeypatch.setattr(loader, "open_runtime", lambda *_: runtime)

    with nullcontext() if passes else pytest.raises(ParityError):
        loader.load_model(bundle.path, Settings())


def test_an_image_keeps_its_pixels_until_its_batch_ended(serve_with, pool):
    runtime = Held()  # reads its images when the gate opens
    client = serve_with(runtime, decoders=1)
    images = [picture_bytes(color) for color in COLORS]

    def post(image):
        return client.post("/v1/classify", content=image).json()["classes"]

    runtime.gate.set()
    expected = [post(image) for image in images]
    runtime.gate.clear()
    runtime.entered.clear()
    first = pool.submit(post, images[0])
    assert runtime.entered.wait(60)
    gone = [connect(client) for _ in images]
    for wire, image in zip(gone, images, strict=True):
        wire.sendall(post_of(image))
    others = [pool.submit(post, image) for image in images[1:]]
    wait_for(lambda: count(client, "queue_depth") == 12)
    for wire in gone:
        wire.close()
    wait_for(lambda: count(client, "queue_depth") == 6)
    runtime.gate.set()
    assert [future.result(60) for future in (first, *others)] == expected


# Logits and the embedding of an image, and whether it gets an answer
OUTPUTS = {
    "finite": ([1.0, 2.0], [0.5], True),
    "a masked class": ([1.0, -np.inf], [0.5], True),
    "masked classes alone": ([-np.inf, -np.inf], [0.5], False),
    "NaN": ([1.0, np.nan], [0.5], False),
    "infinity": ([1.0, np.inf], [0.5], False),
    "an infinite embedding": ([1.0, 2.0], [-np.inf], False),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_an_image_is_answered_if_a_logit_is_finite_and_the_others_mask_classes(case):
    logits, embedding, is_answered = OUTPUTS[case]
    outputs = {
        "logits": np.array([[1.0, 2.0], logits], np.float32),
        "embedding": np.array([[0.5], embedding], np.float32),
    }
    first, second = run_bisected(lambda _: outputs, [None, None], ["logits", "embedding"])
    assert not isinstance(first, HttpError)
    assert isinstance(second, HttpError) is not is_answered
