"""Watches the traffic of each model for drift (`sopdeploy.evaluation.drift`, `watch`).

Once a minute, a block of consecutive predictions is taken. `Watch` divides the blocks into a
reference and a window, which are compared from 100 predictions each on. When another bundle
replaces the model, the reference stays: the new bundle runs on the images that the network saw,
each when no request waits, or after a second. It may have been trained on a few of them, which
raises no alarm (docs/decisions.md).

With a folder of `keep`, each block is a file, which survives a restart, with the network's inputs
as JPEG, and `STATE` tells the division and the alarm. Without one, no image is kept. The
predictions of two bundles are then not compared; the measures of the images, which need no
network, still are.
"""

import asyncio
import io
import logging
import math
import time
import zipfile
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.decision import Decision
from sopdeploy.evaluation.drift import (
    BLOCK,
    CAUSES,
    Answers,
    compare_answers,
    describe_alarms,
    measure_image,
)
from sopdeploy.evaluation.watch import NEWEST_BLOCKS, NUM_BLOCKS, Comparisons, News, Watch
from sopdeploy.file_systems import set_mode
from sopdeploy.files import MAX_IMAGE_BYTES, atomic_write, read_file, remove_leftovers
from sopdeploy.photos.kept import image_id
from sopdeploy_service.inference.drift_state import (
    STATE,
    TRAFFIC,
    DriftState,
    read_drift_state,
)
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.results import Prediction
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.tasks import start_task

BLOCK_SECONDS = 60.0  # between the begins of two blocks: a window is no moment of a busy hour
BLOCK_SUFFIX = ".npz"
JPEG_QUALITY = 95
# What reading a file raises that is damaged or was deleted.
DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)

log = logging.getLogger("sopdeploy.drift")

# Returns the logits (C,) of one image (H, W, 3), or None if it cannot run now.
RunImage: TypeAlias = Callable[
    [Model, NDArray[np.uint8]], Awaitable[NDArray[np.float32] | None]
]


class Seen(NamedTuple):
    """An answer: the network's input (H, W, 3), the logits (C,), the id of the file, which may be empty."""

    pixels: NDArray[np.uint8]
    logits: NDArray[np.float32]
    identity: str = ""


class Block(NamedTuple):
    """`BLOCK` answers of the bundle *version* in their order; *path* is their file, if they have one.

    *time* is when they were complete, in seconds as of `time.time`.
    """

    version: str
    answers: Answers
    identities: NDArray[np.str_]
    time: float
    path: Path | None = None

    @property
    def number(self) -> float:
        """Of its file; infinity without one."""
        return math.inf if self.path is None else int(self.path.stem)


@dataclass(eq=False)
class ModelTraffic:
    """The answers of the model *name*, in blocks that *watch* divides.

    *version*, *num_classes* and *rules* are those of its present bundle; the reference may be of
    an earlier one. *since* is when an alarm began, in seconds as of `time.time`.
    """

    name: str
    version: str
    num_classes: int
    rules: Decision
    folder: Path | None
    watch: Watch[Block] = field(default_factory=Watch)
    since: float = 0.0
    seen: list[Seen] = field(default_factory=list)  # of the block that is being taken
    next_begin: float = 0.0  # of a block
    next_number: int = 0  # of a file
    is_busy: bool = False  # a block is being closed, or a new bundle runs
    comparisons: Comparisons = field(default_factory=dict)

    @property
    def blocks(self) -> list[Block]:
        """The reference and the window."""
        return [*self.watch.reference, *self.watch.window]


class DriftMonitor:
    """Takes blocks of answers and publishes their comparisons; methods run on the event loop."""

    def __init__(self, metrics: Metrics, run: RunImage) -> None:
        """Publish to *metrics*; *run* runs an image with a new bundle."""
        self._metrics = metrics
        self._run = run
        self._folder: Path | None = None
        self._keep_seconds = 0.0
        self._traffic: dict[str, ModelTraffic] = {}  # by name of the model
        self._tasks: set[asyncio.Task[None]] = set()

    def keep_in(self, folder: Path, keep_days: float) -> None:
        """Keep blocks beside the kept photographs in *folder*, for *keep_days*."""
        self._folder = folder
        self._keep_seconds = 86_400 * keep_days

    def offer(self, model: Model, image: object, prediction: Prediction) -> None:
        """Take the answer of *model*, the one that is served now, if a block is being taken or due.

        The first answer of another bundle is not taken: it lets this bundle run on the images of
        the earlier ones. *image* is a file, as bytes, or pixels.
        """
        traffic = self._traffic.get(model.name) or self._open(model)
        if traffic.is_busy:
            return
        if traffic.version != model.version:
            self._start(traffic, self._replace(traffic, model))
            return

        now = time.monotonic()
        if not traffic.seen:
            if now < traffic.next_begin:
                return
            traffic.next_begin = now + BLOCK_SECONDS

        # A copy of the pixels, whose memory the caller may use again.
        logits = prediction.outputs[model.logits_name]
        answer = Seen(prediction.pixels.copy(), logits)
        if isinstance(image, bytes):
            answer = answer._replace(identity=image_id(image))
        traffic.seen.append(answer)

        if len(traffic.seen) == BLOCK:
            self._start(traffic, self._close_block(traffic))

    def _open(self, model: Model) -> ModelTraffic:
        """Begin the traffic of *model*, or go on with that of its folder."""
        folder = None if self._folder is None else self._folder / TRAFFIC / model.name
        rules = model.bundle.manifest.rules
        traffic = ModelTraffic(model.name, model.version, len(model.labels), rules, folder)
        self._traffic[model.name] = traffic
        if folder is not None and folder.is_dir():
            self._start(traffic, self._read(traffic, folder))
        else:
            log_when_due(traffic)
        self._publish(traffic)
        return traffic

    async def _read(self, traffic: ModelTraffic, folder: Path) -> None:
        """Read the blocks of *traffic* in *folder*; answers wait for nothing."""
        await asyncio.to_thread(read_traffic, traffic, folder, self._keep_seconds)
        log_when_due(traffic)
        self._publish(traffic)

    def _start(self, traffic: ModelTraffic, work: Awaitable[None]) -> None:
        """Do *work* in the background, during which *traffic* takes no answers."""
        traffic.is_busy = True

        async def finish() -> None:
            try:
                await work
            except Exception:  # nothing awaits this task
                log.exception("%s: drift is not measured", traffic.name)
            finally:
                traffic.seen = []
                traffic.is_busy = False

        start_task(self._tasks, finish())

    async def _close_block(self, traffic: ModelTraffic) -> None:
        """Add the block that is complete, and compare the window if it is due."""
        block = await asyncio.to_thread(make_block, traffic, traffic.seen)

        if traffic.watch.add(block):
            window = traffic.watch.window
            traffic.comparisons, news = await asyncio.to_thread(
                traffic.watch.test, lambda *parts: compare_blocks(traffic, *parts)
            )
            if news is not None:
                log_news(traffic, news, window)

        await asyncio.to_thread(store_state, traffic)
        await asyncio.to_thread(delete_unneeded, traffic, self._keep_seconds)
        self._publish(traffic)

    async def _replace(self, traffic: ModelTraffic, model: Model) -> None:
        """Let *model*, a new bundle, run on the images of the reference.

        The answers of the earlier bundle stay if too few of these images run for a comparison:
        without their files, if *model* takes images of another shape, or if the server drains.
        """
        # Nothing is known of the answers of the new bundle yet.
        reference = traffic.watch.reference
        traffic.watch.replace(reference)
        traffic.version = model.version
        traffic.num_classes = len(model.labels)
        traffic.rules = model.bundle.manifest.rules
        traffic.comparisons = {}
        self._publish(traffic)

        # The answers of the new bundle, in blocks again.
        blocks = list[Block]()
        seen = list[Seen]()
        for block in reference:
            images = await asyncio.to_thread(read_inputs, block)
            # A block whose file is missing or damaged has no images.
            for image, identity in zip(images, block.identities.tolist(), strict=False):
                logits = await self._run(model, image)
                if logits is not None:
                    seen.append(Seen(image, logits, identity))
                if len(seen) == BLOCK:
                    blocks.append(await asyncio.to_thread(make_block, traffic, seen))
                    seen = []

        if len(blocks) >= NEWEST_BLOCKS:
            traffic.watch.replace(blocks)
        await asyncio.to_thread(store_state, traffic)
        await asyncio.to_thread(delete_unneeded, traffic, self._keep_seconds)

    def keep_only(self, names: Iterable[str]) -> None:
        """Remove the metrics of models that are not among *names*: an alarm about them would never end."""
        for name in set(self._traffic) - set(names):
            traffic = self._traffic.pop(name)
            traffic.comparisons = {}
            self._publish(traffic)
            self._metrics.drift_images.remove(name)

    def _publish(self, traffic: ModelTraffic) -> None:
        """Set the metrics: the images of the window, and the last comparison, if there is one."""
        metrics = self._metrics
        metrics.drift_images.labels(traffic.name).set(len(traffic.watch.window) * BLOCK)
        for name in CAUSES:
            if name in traffic.comparisons:
                compared = traffic.comparisons[name]
                metrics.drift_shift.labels(traffic.name, name).set(compared.shift)
                metrics.drift_p_value.labels(traffic.name, name).set(compared.p_value)
            else:
                metrics.drift_shift.remove(traffic.name, name)
                metrics.drift_p_value.remove(traffic.name, name)


def make_block(traffic: ModelTraffic, seen: Sequence[Seen]) -> Block:
    """Describe the answers that were *seen*; with a folder, write them and the network's inputs to a file."""
    measures = np.stack([measure_image(answer.pixels) for answer in seen])

    # Which images `known` rejects, if the bundle has a threshold for it.
    known = [traffic.rules.answer(answer.logits, top_k=1).known for answer in seen]
    unknown_N = None
    if None not in known:
        unknown_N = np.asarray([is_known is False for is_known in known], np.float32)

    logits_NC = traffic.rules.calibrate(np.stack([answer.logits for answer in seen]))
    block = Block(
        version=traffic.version,
        answers=Answers.of(logits_NC, measures, unknown_N),
        identities=np.asarray([answer.identity for answer in seen]),
        time=time.time(),
    )
    if traffic.folder is None:
        return block

    path = traffic.folder / f"{traffic.next_number:08}{BLOCK_SUFFIX}"
    try:
        traffic.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_block(path, block, [answer.pixels for answer in seen])
    except OSError as error:
        log.warning("%s: cannot be written (%s)", path, error.strerror)
        return block
    traffic.next_number += 1
    return block._replace(path=path)


def write_block(path: Path, block: Block, images: Sequence[NDArray[np.uint8]]) -> None:
    """Write *block* with its *images* as JPEG to *path*, which only its owner can read."""
    arrays: dict[str, Any] = {
        "version": np.asarray(block.version),
        "identities": block.identities,
        "time": np.asarray(block.time),
        **block.answers._asdict(),
    }
    for number, pixels in enumerate(images):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        arrays[f"image-{number}"] = np.frombuffer(file.getvalue(), np.uint8)

    with atomic_write(path) as partial, partial.open("wb") as content:
        set_mode(partial, 0o600)
        np.savez(content, **arrays)


def read_block(path: Path) -> Block:
    """Read a block without its images; raises one of `DAMAGED` for a damaged file."""
    with np.load(io.BytesIO(read_file(path, MAX_IMAGE_BYTES)), allow_pickle=False) as arrays:
        identities = arrays["identities"]
        # What blocks of 0.2.0 lack: which images were rejected is not known, and the time is
        # that of the file.
        parts = {"unknown": np.full(len(identities), np.nan, np.float32), **arrays}
        taken_at = arrays["time"] if "time" in arrays else path.stat().st_mtime
        return Block(
            version=str(arrays["version"]),
            answers=Answers(*(parts[name] for name in Answers._fields)),
            identities=identities,
            time=float(taken_at),
            path=path,
        )


def read_inputs(block: Block) -> list[NDArray[np.uint8]]:
    """Read the network's inputs (H, W, 3) of *block*; none without its file."""
    if block.path is None:
        return []
    try:
        content = io.BytesIO(read_file(block.path, MAX_IMAGE_BYTES))
        with np.load(content, allow_pickle=False) as arrays:
            files = [arrays[f"image-{number}"] for number in range(len(block.identities))]
        return [
            np.asarray(Image.open(io.BytesIO(file.tobytes()), formats=["JPEG"]))
            for file in files
        ]
    except DAMAGED:
        return []


def read_traffic(traffic: ModelTraffic, folder: Path, keep_seconds: float) -> None:
    """Read the blocks in *folder* of the last bundle that answered, and make *traffic* that of this bundle.

    Without a state, as in folders of 0.2.0, the oldest `NUM_BLOCKS` are the reference, the
    others the window.
    """
    remove_leftovers(folder)
    blocks = list[Block]()
    for path in list_blocks(folder, keep_seconds):
        try:
            blocks.append(read_block(path))
        except DAMAGED as error:
            log.warning("%s: is not read (%s)", path, error)
        traffic.next_number = int(path.stem) + 1
    if not blocks:
        return

    traffic.version = blocks[-1].version
    own = [block for block in blocks if block.version == traffic.version]
    watch = traffic.watch
    state = read_drift_state(folder / STATE)
    if state is None:
        watch.reference = own[:NUM_BLOCKS]
        watch.window = own[NUM_BLOCKS:][-NUM_BLOCKS:]
        return

    # A reference without images may be of an earlier bundle.
    watch.reference = [block for block in blocks if block.number in state.reference]
    watch.window = [block for block in own if block.number not in state.reference]
    if state.since is not None:
        traffic.since = state.since.timestamp()
        watch.alarm_blocks = state.alarm_blocks
        watch.is_replaced = state.is_replaced


def store_state(traffic: ModelTraffic) -> None:
    """Write the division of the blocks and the alarm to the folder of *traffic*, if it has one."""
    if traffic.folder is None or not traffic.folder.is_dir():
        return

    watch = traffic.watch
    since = datetime.fromtimestamp(traffic.since, UTC) if watch.is_alarm else None
    state = DriftState(
        reference=tuple(int(block.number) for block in watch.reference if block.path),
        since=since,
        alarm_blocks=watch.alarm_blocks,
        is_replaced=watch.is_replaced,
    )
    path = traffic.folder / STATE
    try:
        with atomic_write(path) as partial:
            set_mode(partial, 0o600)
            partial.write_text(state.model_dump_json(), encoding="utf-8")
    except OSError as error:
        log.warning("%s: cannot be written (%s)", path, error.strerror)


def list_blocks(folder: Path, keep_seconds: float) -> Iterator[Path]:
    """Yield the files of the blocks in *folder*, the oldest first; those too old are deleted."""
    oldest = time.time() - keep_seconds
    for path in sorted(folder.glob(f"[0-9]*{BLOCK_SUFFIX}")):
        if path.stat().st_mtime < oldest:
            path.unlink(missing_ok=True)
        else:
            yield path


def delete_unneeded(traffic: ModelTraffic, keep_seconds: float) -> None:
    """Delete the files that neither the reference nor the window has, and those too old."""
    if traffic.folder is None or not traffic.folder.is_dir():
        return
    needed_paths = {block.path for block in traffic.blocks}
    for path in list_blocks(traffic.folder, keep_seconds):
        if path not in needed_paths:
            path.unlink(missing_ok=True)


def compare_blocks(
    traffic: ModelTraffic, reference: Sequence[Block], window: Sequence[Block]
) -> Comparisons:
    """Compare *window* with *reference*; with answers of another bundle, only the images."""
    answers = join_answers(reference), join_answers(window)
    if any(block.version != traffic.version for block in reference):
        # The classes of another bundle may be more, but only the images are compared.
        num_classes = 1 + max(int(part.classes.max()) for part in answers)
        return {"image": compare_answers(*answers, num_classes)["image"]}
    return compare_answers(*answers, traffic.num_classes)


def log_when_due(traffic: ModelTraffic) -> None:
    """Log how many images are needed until the traffic is compared, if it was not yet."""
    if not traffic.comparisons and not traffic.watch.is_alarm:
        log.info(
            "%s: drift is compared for the first time after %d images",
            traffic.name,
            traffic.watch.num_needed * BLOCK,
        )


def log_news(traffic: ModelTraffic, news: News, window: Sequence[Block]) -> None:
    """Log what is *new* about an alarm, whose *window* was compared."""
    watch = traffic.watch
    if news == "ends":
        log.info("%s: no drift any more", traffic.name)
        return

    if news == "begins":
        traffic.since = watch.window[0].time

    # The share of rejected images is told in any case.
    before = join_answers(watch.reference)
    now = join_answers(window).newest(BLOCK * watch.alarm_blocks)
    shares = ""
    if before.has_unknown and now.has_unknown:
        rejected = [100 * part.unknown.mean() for part in (now, before)]
        shares = f"; rejected {rejected[0]:.0f} % of the images, before {rejected[1]:.0f} %"

    since = datetime.fromtimestamp(traffic.since, UTC)
    causes = describe_alarms(traffic.comparisons)
    text = "drift" if news == "begins" else "the new bundle does not end the drift"
    log.warning(
        "%s: %s since %s, in the last %d images: %s%s; label 60, train, promote",
        traffic.name,
        text,
        f"{since:%Y-%m-%d %H:%M} UTC",
        len(now.classes),
        causes,
        shares,
    )


def join_answers(blocks: Iterable[Block]) -> Answers:
    """Join the answers of *blocks* in their order."""
    arrays = zip(*(block.answers for block in blocks), strict=True)
    return Answers(*(np.concatenate(parts) for parts in arrays))
