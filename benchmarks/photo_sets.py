"""Sets of photographs with their vectors and measures, computed once, and bundles as `train` fits them."""

import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from photo_vectors import class_folders, fit_draw, join_vectors, open_network, read_batches
from PIL import Image, ImageFilter

from sopdeploy.decision import log_sum_exp
from sopdeploy.evaluation.drift import measure_image
from sopdeploy.photos.photo import ImageFiles
from sopdeploy.training.few_shot.classifier import unit_length
from sopdeploy.training.few_shot.cross_validation import make_folds

Array = NDArray[Any]
BLUR = 0.008  # of the shorter side: the radius of the blur of the other camera
TINT = (1.1, 1.0, 0.82)  # its factors of red, green and blue
QUALITY = 60  # of its JPEG files


@dataclass
class Photographs:
    """Vectors (2N, D), their columns by part, classes (2N,), and measures (2N, F) of N photographs.

    The second N are the same photographs by another camera, which blurs and tints them.
    """

    vectors: Array
    columns: list[slice]
    classes: Array
    measures: Array
    labels: tuple[str, ...]

    @property
    def count(self) -> int:
        """N."""
        return len(self.classes) // 2


class _OtherCamera(ImageFiles):
    """Photographs as another camera would have taken them."""

    __slots__ = ()

    def read(self, index: int) -> bytes:
        """Read a photograph, blur and tint it, and encode it again."""
        image = Image.open(BytesIO(ImageFiles.read(self, index))).convert("RGB")
        image = image.filter(ImageFilter.GaussianBlur(BLUR * min(image.size)))
        pixels = np.asarray(image, np.float32) * np.asarray(TINT, np.float32)

        file = BytesIO()
        tinted = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        tinted.save(file, "JPEG", quality=QUALITY)
        return file.getvalue()


def read_sets(
    data: Path, unknown: Path, weights: Path, cache: Path | None = None
) -> tuple[Photographs, Photographs]:
    """Compute the photographs of *data*, which determine the projections, and those of *unknown*.

    Both are folders <class>/*.jpg. With the folder *cache*, they are computed once; its file has
    the name of *data*.
    """
    file = None if cache is None else cache / f"{data.name}-{unknown.name}-cameras.npz"
    if file is not None and file.exists():
        return _load(file)

    network = open_network(weights)
    columns = network.network.pooled_head.columns()
    stored: dict[str, Array] = {"stops": np.asarray([part.stop for part in columns])}
    fitted: Any = ()
    for name, folder in (("data", data), ("unknown", unknown)):
        vectors = []
        measures = []
        for images in (_list_images(folder, ImageFiles), _list_images(folder, _OtherCamera)):
            batches = read_batches(network, images)
            fitted = fitted or batches
            vectors.append(join_vectors(network, batches, fitted))
            measures.append(_measure(images, network.settings.preprocess))
        stored[f"{name}-vectors"] = np.concatenate(vectors)
        stored[f"{name}-measures"] = np.concatenate(measures)
        stored[f"{name}-classes"] = np.tile(images.targets, 2)
        stored[f"{name}-labels"] = np.asarray(images.labels)

    if file is None:
        return _describe(stored)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, allow_pickle=False, **stored)
    return _load(file)


def _load(file: Path) -> tuple[Photographs, Photographs]:
    with np.load(file) as stored:
        return _describe(stored)


def _describe(stored: Any) -> tuple[Photographs, Photographs]:
    stops = stored["stops"].tolist()
    columns = [slice(*bounds) for bounds in zip([0, *stops], stops, strict=False)]
    data, unknown = (
        Photographs(
            stored[f"{name}-vectors"],
            columns,
            stored[f"{name}-classes"],
            stored[f"{name}-measures"],
            tuple(stored[f"{name}-labels"].tolist()),
        )
        for name in ("data", "unknown")
    )
    return data, unknown


def _list_images(folder: Path, images_class: type[ImageFiles]) -> ImageFiles:
    """List the photographs below *folder*, by class."""
    labels = class_folders(folder)
    files = [
        (number, path)
        for number, label in enumerate(labels)
        for path in sorted((folder / label).iterdir())
    ]
    names = np.asarray([os.fsencode(path.relative_to(folder)) for _, path in files], np.bytes_)
    return images_class(folder, labels, names, np.asarray([number for number, _ in files]))


def _measure(images: ImageFiles, rules: Any) -> Array:
    """Measure *images* as a server does (N, F)."""
    return np.stack(
        [
            measure_image(np.asarray(images.preprocess(index, rules)))
            for index in range(len(images))
        ]
    )


class Bundle:
    """A head on photographs with the numbers *chosen* (n,) and *labels* (n,), with the threshold of `known`.

    *is_first* says that no bundle was live before, so that `train` has no `--from`.
    """

    def __init__(
        self,
        photographs: Photographs,
        chosen: Array,
        labels: Array,
        seed: int,
        *,
        is_first: bool = False,
    ) -> None:
        # Only the classes that have photographs.
        self.known_classes = np.unique(labels)
        numbers = np.searchsorted(self.known_classes, labels)
        vectors = photographs.vectors[chosen]
        fitted = fit_draw(
            vectors,
            numbers,
            photographs.columns,
            seed,
            chosen,
            len(self.known_classes),
            has_margins=not is_first,
        )
        self.head = fitted.problem.fit_all(fitted.scaling)
        self.own = photographs.columns[0]
        self.means = fitted.problem.class_means()
        folds = make_folds(fitted.problem.targets, [str(index) for index in chosen], 5, seed)[0]
        self.threshold = float(np.quantile(fitted.problem.cosines(folds), 0.05))

    def logits(self, vectors: Array) -> Array:
        """Compute the logits (n, K), whose log-sum-exp is the cosine to the nearest class mean."""
        logits = self.head.logits(vectors)
        cosines = (unit_length(vectors[:, self.own]) @ self.means.T).max(axis=1)
        return np.asarray(logits - log_sum_exp(logits)[:, None] + cosines[:, None], np.float32)

    def answers(self, vectors: Array) -> Array:
        """Return the most probable classes (n,)."""
        return np.asarray(self.known_classes[self.logits(vectors).argmax(axis=1)])
