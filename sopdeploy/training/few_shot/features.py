"""The frozen network with the features of all images, and the network with a fitted classifier."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sopdeploy.base.seeds import derive_seed
from sopdeploy.data.batches import load_batches
from sopdeploy.data.photos.copies import SMALL, shrink
from sopdeploy.data.photos.network_inputs import Dataset
from sopdeploy.data.photos.photo import LabeledImages
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import IMAGES_FORMAT, Normalize, images_format
from sopdeploy.models.base import Classifier
from sopdeploy.models.second_order_head import HeadConfig, HeadKind, SecondOrderHead, with_head
from sopdeploy.training.few_shot.cache import Entry, FeatureCache
from sopdeploy.training.few_shot.classifier import (
    MAX_RANK,
    LinearHead,
    LinearProblem,
    Space,
    unit_length,
)
from sopdeploy.training.settings.head import FeatureSettings

# channels of the covariances, and number of feature maps
WIDTH = 64
TAPS = 2
# images; the maps of four stay in a CPU's cache, which halves the time
BATCHES = {
    "cpu": 4,
    "cuda": 64,
}
CORNER = 0.7  # share of each side of a map that a corner covers; its average finds crops
MAX_WAITING = 16  # batches that wait until more photographs are to be computed
PROJECTION_IMAGES = 128  # for the projections: with 49 positions per image, 6,272 rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """The features of N images by a frozen network.

    Attributes:
        head: The head to fit.
        space: The span of the inputs of `head`.
        reduced: The coordinates (N, R) of the inputs in `space`.
        own: The network's own vectors (N, D_0) of length 1.
        views: What `average_views` returns, (N, V, C) for each map.
        hashes: Hashes of the pixels.
        file_hashes, times: Hashes (N,) of the files, and `Photo.taken` (N,).
        small: Small images (N, S, S).
    """

    head: HeadConfig
    space: Space
    reduced: NDArray[np.float32]
    own: NDArray[np.float32]
    views: list[NDArray[np.float32]]
    hashes: list[str]
    file_hashes: NDArray[np.int64]
    times: NDArray[np.int64]
    small: NDArray[np.uint8]


@torch.no_grad()
def compute_features(
    outputs: "CachedNetwork",
    kind: HeadKind,
    images: LabeledImages,
    on_image: Callable[[int, int], None],
) -> Features:
    """Fit the projections of the network to its feature maps, and compute the features of *images*.

    The images are shuffled, because the first ones determine the projections and the space.
    *kind* is the kind of the head to fit. *on_image* receives the numbers of images done and in
    total.
    """
    count = len(images)

    # The first images determine the projections of the feature maps.
    pooled = outputs.network.pooled_head
    head = head_to_fit(outputs.network, kind)
    batches = outputs.batches(images, np.random.default_rng(0).permutation(count).tolist())
    first = list(islice(batches, PROJECTION_IMAGES // outputs.batch_size))
    pooled.fit_projection([batch.maps for batch in first])
    columns = pooled.columns() if head.taps else pooled.columns()[:1]  # of what the head reads
    projection = _Projection(count, columns)

    # What is known of each image, at its index.
    hashes = [""] * count
    file_hashes = np.zeros(count, np.int64)
    times = np.zeros(count, np.int64)
    small = np.zeros((count, SMALL, SMALL), np.uint8)
    own = np.zeros((count, columns[0].stop), np.float32)
    views: list[NDArray[np.float32]] = []

    num_done = 0
    for batch in chain(first, batches):
        vectors = pooled.vector(batch.own_vectors, batch.maps).float().cpu().numpy()
        projection.add(batch.indices, vectors)
        views_of_batch = average_views(batch.own_vectors, batch.maps)
        if not views:  # their shapes are known from the first batch on
            views = [np.zeros((count, *part.shape[1:]), np.float32) for part in views_of_batch]
        for of_all, of_batch in zip(views, views_of_batch, strict=True):
            of_all[batch.indices] = of_batch

        own[batch.indices] = unit_length(vectors[:, columns[0]])
        file_hashes[batch.indices] = batch.file_hashes
        times[batch.indices] = batch.times
        small[batch.indices] = batch.small
        for index, pixel_hash in zip(batch.indices, batch.hashes, strict=True):
            hashes[index] = pixel_hash

        num_done += len(batch.indices)
        on_image(num_done, count)

    return Features(
        head=head,
        space=cast(Space, projection.space),  # all images are done
        reduced=projection.reduced,
        own=own,
        views=views,
        hashes=hashes,
        file_hashes=file_hashes,
        times=times,
        small=small,
    )


class _Projection:
    """The coordinates `reduced` (count, R) of vectors in the space of the first of them."""

    def __init__(self, count: int, columns: Sequence[slice]) -> None:
        self.count = count
        self.columns = columns
        self.space: Space | None = None
        self.reduced = np.zeros((count, 0), np.float32)
        self.num_added = 0
        self.waiting: list[tuple[list[int], NDArray[np.float32]]] = []

    def add(self, indices: list[int], vectors: NDArray[np.float32]) -> None:
        """Add *vectors* (B, D) of the images *indices*; enough of them, or all, build the space.

        Until then, `reduced` has none of them.
        """
        self.num_added += len(indices)
        self.waiting.append((indices, vectors))
        if self.num_added < min(self.count, MAX_RANK):  # the vectors wait for the space
            return

        waiting_indices = np.concatenate([indices for indices, _ in self.waiting])
        parts = [
            np.concatenate([vectors[:, part] for _, vectors in self.waiting])
            for part in self.columns
        ]
        self.waiting = []
        if self.space is None:
            self.space = Space.of([part[:MAX_RANK] for part in parts])
            self.reduced = np.zeros((self.count, self.space.basis.shape[1]), np.float32)
        self.reduced[waiting_indices] = self.space.project(np.concatenate(parts, axis=1))


@torch.no_grad()
def build_fitted(
    network: SecondOrderHead,
    head: HeadConfig,
    problem: LinearProblem,
    fitted: LinearHead,
    settings: FeatureSettings,
) -> SecondOrderHead:
    """Copy *network*, on its device and in its mode, with a *head* of the weights *fitted* to *problem*."""
    # With one class per image, the energy of the logits is the cosine to the nearest class mean.
    has_energy = problem.targets.activation == "softmax"
    deployed = network.copy_with_head(head.model_copy(update={"cosine": has_energy}))
    pooled = deployed.pooled_head
    # If the head reads roots of covariances, it needs the projections of *network*.
    if pooled.poolings:
        pooled.poolings.load_state_dict(network.pooled_head.poolings.state_dict())
    if has_energy:
        pooled.means.copy_(torch.from_numpy(problem.class_means()))
    pooled.fc.weight.copy_(torch.from_numpy(fitted.weight))
    pooled.fc.bias.copy_(torch.from_numpy(fitted.bias))
    layout = torch.channels_last if settings.channels_last else torch.preserve_format
    return deployed.to(memory_format=layout)


class _Loaded(NamedTuple):
    """A batch: pixels (B, H, W, 3) uint8, hashes of files and times (B,), and entries of the cache.

    `paths` are those of the entries. An entry is None if it is missing, until it is computed.
    """

    pixels: Tensor
    hashes: NDArray[np.int64]
    times: NDArray[np.int64]
    paths: list[Path]
    entries: list[Entry | None]


@dataclass(frozen=True, slots=True)
class _Photographs(Dataset):
    """Pixels of photographs, decoded only if the *cache* has no entry, or at *always_decoded*."""

    preprocess: Preprocess
    cache: FeatureCache
    always_decoded: int

    def batch(self, indices: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return the pixels, black if not decoded, and [hash of the file, `taken`, 1 if decoded] (B, 3).

        Photographs with an entry in the cache are not decoded, except for `always_decoded`.
        """
        side = self.preprocess.crop
        pixels = np.zeros((len(indices), side, side, 3), np.uint8)
        facts = []
        for position, index in enumerate(indices):
            photo = self.images.photo(index)
            is_decoded = index == self.always_decoded or not self.cache.has(photo.file_hash)
            if is_decoded:
                pixels[position] = photo.preprocess(self.preprocess)
            facts.append([photo.file_hash, photo.taken, is_decoded])
        return pixels, np.asarray(facts, np.int64)


class FeatureBatch(NamedTuple):
    """The features of the images at `indices`.

    These are the hashes of their files and their times (B,), `small` images (B, S, S), `hashes` of
    their pixels, own vectors (B, D_0), and maps (B, C, H, W) by tap.
    """

    indices: list[int]
    file_hashes: NDArray[np.int64]
    times: NDArray[np.int64]
    small: NDArray[np.uint8]
    hashes: list[str]
    own_vectors: Tensor
    maps: dict[str, Tensor]


class CachedNetwork:
    """The frozen `network`, whose outputs for photographs are kept in the cache."""

    def __init__(self, network: SecondOrderHead, settings: FeatureSettings) -> None:
        memory_format = images_format(network)
        self.device = next(network.parameters()).device
        self.network = network.eval().to(memory_format=memory_format)
        self.settings = settings
        self.normalize = Normalize(settings.preprocess, memory_format).to(self.device)
        self.cache = FeatureCache(network, settings)
        self.batch_size = BATCHES[self.device.type]

    def batches(self, images: LabeledImages, indices: list[int]) -> Iterator[FeatureBatch]:
        """Yield the outputs for the images at *indices*, in batches on the device of the network."""
        size = self.batch_size
        chunks = [indices[start : start + size] for start in range(0, len(indices), size)]
        for chosen, (loaded, entries) in zip(chunks, self._load(images, chunks), strict=True):
            # From entries by image to arrays of all images: hashes, small images, own vectors, and
            # the maps of each tap.
            outputs = zip(*entries, strict=True)
            digests, small, own_vectors, *maps = (
                np.ascontiguousarray(np.stack(arrays)) for arrays in outputs
            )
            hashes = [digest.tobytes().hex() for digest in digests]

            # The own vectors and the maps, on the device of the network.
            maps_by_tap = {
                tap: torch.from_numpy(features).to(
                    self.device, memory_format=torch.channels_last
                )
                for tap, features in zip(self.network.maps, maps, strict=True)
            }
            own = torch.from_numpy(own_vectors).to(self.device)

            yield FeatureBatch(
                chosen, loaded.hashes, loaded.times, small, hashes, own, maps_by_tap
            )

    def _load(
        self, images: LabeledImages, batches: list[list[int]]
    ) -> Iterator[tuple[_Loaded, list[Entry]]]:
        """Yield each batch of images, and the entries of all of them; new ones are written to the cache.

        The first photograph is computed in any case: if its entry differs, something that the
        name of the entry does not contain has changed, and the cache is not read.
        """
        photographs = _Photographs(images, self.settings.preprocess, self.cache, batches[0][0])
        loader = load_batches(photographs, batches, self.settings.workers, torch.device("cpu"))
        # Batches wait until their photographs without an entry fill batches of the network.
        waiting: list[_Loaded] = []
        for batch, (pixels, facts) in zip(batches, loader, strict=True):
            hashes, times, are_decoded = facts.numpy().T
            paths = [self.cache.mark_used(file_hash) for file_hash in hashes.tolist()]
            entries = [self.cache.read(path) for path in paths]

            # The first photograph tells whether the cache can be read.
            if batch is batches[0] and entries[0] is not None:
                computed = self._compute(pixels[:1])[0]
                if not all(map(np.array_equal, entries[0], computed)):
                    self.cache.is_stale = True
                    yield from self._load(images, batches)  # again, without the cache
                    return

            for position, entry in enumerate(entries):
                # The entry is damaged, so the photograph was not decoded.
                if entry is None and not are_decoded[position]:
                    decoded = images.preprocess(batch[position], self.settings.preprocess)
                    pixels[position] = torch.tensor(decoded)  # a copy

            # Compute the missing entries of several batches together.
            waiting.append(_Loaded(pixels, hashes, times, paths, entries))
            num_missing = sum(loaded.entries.count(None) for loaded in waiting)
            is_last = batch is batches[-1]
            if num_missing % self.batch_size == 0 or len(waiting) == MAX_WAITING or is_last:
                yield from self._complete(waiting)
                waiting = []

    def _complete(self, waiting: list[_Loaded]) -> Iterator[tuple[_Loaded, list[Entry]]]:
        """Compute and write the missing entries of the batches *waiting*; yield the batches with all entries."""
        missing: list[tuple[_Loaded, int]] = []
        for loaded in waiting:
            missing += [
                (loaded, position)
                for position, entry in enumerate(loaded.entries)
                if entry is None
            ]

        for start in range(0, len(missing), self.batch_size):
            part = missing[start : start + self.batch_size]
            computed = self._compute(
                torch.stack([loaded.pixels[position] for loaded, position in part])
            )
            for (loaded, position), entry in zip(part, computed, strict=True):
                loaded.entries[position] = entry
                self.cache.write(loaded.paths[position], entry)

        for loaded in waiting:
            yield loaded, cast(list[Entry], loaded.entries)

    def _compute(self, pixels: Tensor) -> list[Entry]:
        """Compute the entries of *pixels* (B, H, W, 3) in a full batch.

        The size of a batch decides the last bits of the outputs.
        """
        # Of fewer images than a batch, the last one is repeated.
        positions = torch.arange(self.batch_size).clamp(max=len(pixels) - 1)
        own, maps = self.network.head_inputs(self.normalize(pixels[positions].to(self.device)))
        outputs = [output.cpu().numpy() for output in (own, *maps.values())]
        entries = []
        for position, image in enumerate(pixels.numpy()):
            pixel_hash = np.frombuffer(hashlib.sha256(image.tobytes()).digest(), np.uint8)
            entries.append(
                [
                    pixel_hash,
                    shrink(Image.fromarray(image)),
                    *(output[position] for output in outputs),
                ]
            )
        return entries


def average_views(own_vectors: Tensor, maps: Mapping[str, Tensor]) -> list[NDArray[np.float32]]:
    """Average each of *maps* (B, C, H, W) as a whole and in four corners; (B, 5, C) each.

    Without maps, the *own_vectors* (B, D_0) are the only view, (B, 1, D_0).
    """
    if not maps:
        return [own_vectors.float().cpu().numpy()[:, None]]
    averages = []
    for features in maps.values():
        high, wide = (max(1, round(CORNER * side)) for side in features.shape[2:])
        rows = (slice(high), slice(-high, None))
        columns = (slice(wide), slice(-wide, None))
        corners = [features[:, :, row, column] for row in rows for column in columns]
        views = [part.float().mean(dim=(2, 3)) for part in (features, *corners)]
        averages.append(torch.stack(views, dim=1).cpu().numpy())
    return averages


def full_head(settings: FeatureSettings, model: Classifier) -> SecondOrderHead:
    """Give *model* a random head on all statistics of its last taps, or else on its own vector."""
    torch.manual_seed(derive_seed(settings.seed, "head"))
    head = HeadConfig(kind="gap")
    if model.tap_channels:
        last_taps = tuple(model.tap_channels)[-TAPS:]
        head = HeadConfig(kind="gap+isqrt", taps=last_taps, width=WIDTH)
    full = with_head(settings.model.name, model, head).eval()
    vars(full)[IMAGES_FORMAT] = images_format(model)
    return full


def head_to_fit(full: SecondOrderHead, kind: HeadKind) -> HeadConfig:
    """Configure the head of *kind* on the taps of *full*; without feature maps, "gap" is the only one."""
    taps = tuple(full.pooled_head.channels)
    if not taps or kind == "gap":
        return HeadConfig(kind="gap")
    return HeadConfig(kind=kind, taps=taps, width=WIDTH)
