"""Watches the traffic of each model for drift (`sopdeploy.evaluation.drift`).

Once a minute, a block of consecutive answers is taken. The first `WINDOW` answers are the
reference, the newest `WINDOW` after them the window, which is compared after each `TEST_BLOCKS`
blocks. When another bundle replaces the model, the newest `WINDOW` answers become its reference:
the new bundle runs on the images that the network saw, each when no request waits, or after a
second. Those that were labelled are left out, and so are their copies: the new bundle may have
been trained on them.

With a folder of `keep`, each block is a file, which survives a restart, with the network's inputs
as JPEG. Without one, no image is kept. The answers of two bundles are then not compared; the
measures of the photographs, which need no network, still are.
"""

import asyncio
import hashlib
import io
import logging
import time
import zipfile
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.evaluation.drift import (
    BLOCK,
    CAUSES,
    WINDOW,
    Answers,
    Comparison,
    compare_answers,
    compare_samples,
    describe_alarms,
    measure_image,
)
from sopdeploy.file_systems import set_mode
from sopdeploy.files import MAX_IMAGE_BYTES, atomic_write, read_file, remove_leftovers
from sopdeploy.images.near_hash import NEAR_BITS, near_hash
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.results import Prediction
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.tasks import start_task

BLOCK_SECONDS = 60.0  # between the begins of two blocks: a window is no moment of a busy hour
NUM_BLOCKS = WINDOW // BLOCK
TEST_BLOCKS = 10  # new ones in the window from test to test
MIN_BLOCKS = 20  # of a reference, after the labelled photographs are left out
TRAFFIC = ".traffic"  # subfolder of the folder of kept photographs
BLOCK_SUFFIX = ".npz"
JPEG_QUALITY = 95
# What reading a file raises that is damaged or was deleted.
DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)

log = logging.getLogger("sopdeploy.drift")

# Returns the logits (C,) of one image (H, W, 3), or None if it cannot run now.
RunImage: TypeAlias = Callable[
    [Model, NDArray[np.uint8]], Awaitable[NDArray[np.float32] | None]
]
# Tells whether a file with this hash and these logits is kept to be trained on.
IsWorthLabel: TypeAlias = Callable[[Model, NDArray[np.float32], str], bool]


class Seen(NamedTuple):
    """An answer: the network's input (H, W, 3), the logits (C,), the id of the file, which may be empty.

    `is_worth` says that the file may have been kept to be trained on.
    """

    pixels: NDArray[np.uint8]
    logits: NDArray[np.float32]
    identity: str = ""
    is_worth: bool = False


class Block(NamedTuple):
    """`BLOCK` answers of the bundle *version* in their order; *path* is their file, if they have one."""

    version: str
    answers: Answers
    identities: NDArray[np.str_]
    near_hashes: NDArray[np.uint64]
    are_worth: NDArray[np.bool_]
    path: Path | None = None


@dataclass(eq=False)
class ModelTraffic:
    """The answers of the model *name*, in blocks.

    *version* is that of its present bundle; the *reference* may be of an earlier one.
    """

    name: str
    version: str
    num_classes: int
    folder: Path | None
    reference: list[Block] = field(default_factory=list)
    window: deque[Block] = field(default_factory=lambda: deque(maxlen=NUM_BLOCKS))
    seen: list[Seen] = field(default_factory=list)  # of the block that is being taken
    next_begin: float = 0.0  # of a block
    num_untested: int = 0  # blocks of the window since the last test
    next_number: int = 0  # of a file
    is_busy: bool = False  # a block is being closed, or a new bundle runs
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    was_alarm: bool = False

    @property
    def blocks(self) -> list[Block]:
        """The reference and the window."""
        return [*self.reference, *self.window]


class DriftMonitor:
    """Takes blocks of answers and publishes their comparisons; methods run on the event loop."""

    def __init__(self, metrics: Metrics, run: RunImage) -> None:
        """Publish to *metrics*; *run* runs an image with a new bundle."""
        self._metrics = metrics
        self._run = run
        self._folder: Path | None = None
        self._keep_seconds = 0.0
        self._is_worth: IsWorthLabel = lambda *_: False
        self._traffic: dict[str, ModelTraffic] = {}  # by name of the model
        self._tasks: set[asyncio.Task[None]] = set()

    def keep_in(self, folder: Path, keep_days: float, is_worth: IsWorthLabel) -> None:
        """Keep blocks beside the kept photographs in *folder*, for *keep_days*; *is_worth* is the keeper's."""
        self._folder = folder
        self._keep_seconds = 86_400 * keep_days
        self._is_worth = is_worth

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
            sha256 = hashlib.sha256(image).hexdigest()
            is_worth = self._is_worth(model, logits, sha256)
            answer = answer._replace(identity=sha256[:32], is_worth=is_worth)
        traffic.seen.append(answer)

        if len(traffic.seen) == BLOCK:
            self._start(traffic, self._close_block(traffic))

    def _open(self, model: Model) -> ModelTraffic:
        """Begin the traffic of *model*, or go on with that of its folder."""
        folder = None if self._folder is None else self._folder / TRAFFIC / model.name
        traffic = ModelTraffic(model.name, model.version, len(model.labels), folder)
        self._traffic[model.name] = traffic
        if folder is not None and folder.is_dir():
            self._start(traffic, self._read(traffic, folder))
        self._publish(traffic)
        return traffic

    async def _read(self, traffic: ModelTraffic, folder: Path) -> None:
        """Read the blocks of *traffic* in *folder*; answers wait for nothing."""
        await asyncio.to_thread(read_traffic, traffic, folder, self._keep_seconds)
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

        # The window begins when the reference is complete.
        if len(traffic.reference) < NUM_BLOCKS and not traffic.window:
            traffic.reference.append(block)
        else:
            traffic.window.append(block)
            traffic.num_untested += 1
        await asyncio.to_thread(delete_unneeded, traffic, self._keep_seconds)

        if len(traffic.window) == NUM_BLOCKS and traffic.num_untested >= TEST_BLOCKS:
            traffic.num_untested = 0
            traffic.comparisons = await asyncio.to_thread(compare_traffic, traffic)
            self._log_alarms(traffic)
            # Not during an alarm: drifted answers would become the reference.
            if not traffic.was_alarm:
                renew_reference(traffic)
        self._publish(traffic)

    def _log_alarms(self, traffic: ModelTraffic) -> None:
        """Log when an alarm begins or ends, as the last comparison shows; note it in `was_alarm`."""
        alarms = describe_alarms(traffic.comparisons)
        if alarms and not traffic.was_alarm:
            log.warning(
                "%s: drift in the last %s images: %s; label 60, half of them of the sample, train, compare, "
                "promote",
                traffic.name,
                f"{WINDOW:,}",
                alarms,
            )
        if traffic.was_alarm and not alarms:
            log.info("%s: no drift any more", traffic.name)
        traffic.was_alarm = bool(alarms)

    async def _replace(self, traffic: ModelTraffic, model: Model) -> None:
        """Make the newest answers the reference of *model*, a new bundle, which runs on their images.

        With fewer than `MIN_BLOCKS` blocks of its own answers, those of the earlier bundle stay.
        """
        traffic.reference = traffic.blocks[-NUM_BLOCKS:]

        # Nothing is known of the answers of the new bundle yet.
        traffic.window.clear()
        traffic.version = model.version
        traffic.num_classes = len(model.labels)
        traffic.num_untested = 0
        traffic.comparisons = {}
        traffic.was_alarm = False
        self._publish(traffic)

        # The answers of the new bundle, in blocks again.
        are_labelled = await asyncio.to_thread(find_labelled, traffic.reference, self._folder)
        blocks = list[Block]()
        seen = list[Seen]()
        for block, left_out in zip(traffic.reference, are_labelled, strict=True):
            images = await asyncio.to_thread(read_inputs, block)
            # A block whose file is missing or damaged has no images.
            for image, identity, is_left_out in zip(
                images, block.identities.tolist(), left_out.tolist(), strict=False
            ):
                logits = None if is_left_out else await self._run(model, image)
                if logits is not None:
                    seen.append(Seen(image, logits, identity))
                if len(seen) == BLOCK:
                    blocks.append(await asyncio.to_thread(make_block, traffic, seen))
                    seen = []

        if len(blocks) >= MIN_BLOCKS:
            traffic.reference = blocks
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
        metrics.drift_images.labels(traffic.name).set(len(traffic.window) * BLOCK)
        for name in CAUSES:
            if name in traffic.comparisons:
                shift, p_value = traffic.comparisons[name]
                metrics.drift_shift.labels(traffic.name, name).set(shift)
                metrics.drift_p_value.labels(traffic.name, name).set(p_value)
            else:
                metrics.drift_shift.remove(traffic.name, name)
                metrics.drift_p_value.remove(traffic.name, name)


def make_block(traffic: ModelTraffic, seen: Sequence[Seen]) -> Block:
    """Describe the answers that were *seen*; with a folder, write them and the network's inputs to a file."""
    measures = np.stack([measure_image(answer.pixels) for answer in seen])
    hashes = [int(near_hash(answer.pixels), 16) for answer in seen]
    block = Block(
        version=traffic.version,
        answers=Answers.of(np.stack([answer.logits for answer in seen]), measures),
        identities=np.asarray([answer.identity for answer in seen]),
        near_hashes=np.asarray(hashes, np.uint64),
        are_worth=np.asarray([answer.is_worth for answer in seen]),
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
        "near_hashes": block.near_hashes,
        "are_worth": block.are_worth,
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
        return Block(
            version=str(arrays["version"]),
            answers=Answers(*(arrays[name] for name in Answers._fields)),
            identities=arrays["identities"],
            near_hashes=arrays["near_hashes"],
            are_worth=arrays["are_worth"],
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

    The oldest `NUM_BLOCKS` are the reference, the others the window.
    """
    remove_leftovers(folder)
    blocks = list[Block]()
    for path in list_blocks(folder, keep_seconds):
        try:
            blocks.append(read_block(path))
        except DAMAGED as error:
            log.warning("%s: is not read (%s)", path, error)
        traffic.next_number = int(path.stem) + 1
    if blocks:
        traffic.version = blocks[-1].version
        own = [block for block in blocks if block.version == traffic.version]
        traffic.reference = own[:NUM_BLOCKS]
        traffic.window.extend(own[NUM_BLOCKS:])


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


def find_labelled(blocks: Sequence[Block], folder: Path | None) -> list[NDArray[np.bool_]]:
    """Return, for each of *blocks*, the mask of the answers whose photographs count as labelled.

    A photograph is labelled if it was kept in *folder* to be trained on and is not there any
    more; its near-duplicates count, too. Letters: N answers of a block, L labelled photographs.
    """
    if folder is None or not blocks:
        return [np.zeros(len(block.identities), np.bool_) for block in blocks]

    # What still has a record in the folder waits for its label.
    waiting = [path.stem for path in folder.iterdir() if path.suffix == ".json"]
    labelled_hashes = np.concatenate(
        [
            block.near_hashes[block.are_worth & ~np.isin(block.identities, waiting)]
            for block in blocks
        ]
    )

    def resemble_labelled(hashes_N: NDArray[np.uint64]) -> NDArray[np.bool_]:
        bits_NL = np.bitwise_count(hashes_N[:, None] ^ np.unique(labelled_hashes)[None])
        near_N: NDArray[np.bool_] = (bits_NL <= NEAR_BITS).any(axis=1)
        return near_N

    return [resemble_labelled(block.near_hashes) for block in blocks]


def renew_reference(traffic: ModelTraffic) -> None:
    """Replace a reference with answers of an earlier bundle by the window, so that answers compare, too."""
    if any(block.version != traffic.version for block in traffic.reference):
        traffic.reference = list(traffic.window)
        traffic.window.clear()


def compare_traffic(traffic: ModelTraffic) -> dict[str, Comparison]:
    """Compare the window with the reference; of a reference with answers of another bundle, only the photographs."""
    reference = join_answers(traffic.reference)
    window = join_answers(traffic.window)
    if all(block.version == traffic.version for block in traffic.reference):
        return compare_answers(reference, window, traffic.num_classes)
    measures = [answers.image.astype(np.float64) for answers in (reference, window)]
    return {"image": compare_samples(*measures)}


def join_answers(blocks: Iterable[Block]) -> Answers:
    """Join the answers of *blocks* in their order."""
    arrays = zip(*(block.answers for block in blocks), strict=True)
    return Answers(*(np.concatenate(parts) for parts in arrays))
