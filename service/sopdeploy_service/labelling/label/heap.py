"""A heap: photographs of a folder that nobody has sorted, and suggestions for their classes.

As soon as each class has two photographs, the class of another one is suggested by the closest
class mean. A suggestion is no label: most of a heap may show none of the classes yet, and few sorted
photographs do not tell which ones (docs/decisions.md). Of kept photographs that the network
rejected, those that look most alike may be a new class. The vectors come from a function that the
caller gives, because the service works without torch.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sopdeploy.decision import softmax
from sopdeploy.images.signatures import is_image
from sopdeploy.photos.files import kept_id, list_folder

Vector: TypeAlias = NDArray[np.float32]
Embed: TypeAlias = Callable[[Sequence[Path]], Iterator[tuple[Path, Vector]]]
MIN_PHOTOGRAPHS = 2  # of each class
MAX_LEARNED = 20  # photographs of each class that were sorted before
NEIGHBORS = 5  # of a photograph, whose similarity tells how much a group looks alike
MAX_GROUP = 12  # photographs that may be a new class
SCALE = 25.0  # of cosines as logits: 0.1 more makes a class 12 times as probable

log = logging.getLogger("sopdeploy_service.labelling.heap")


class Heap(NamedTuple):
    """The `images` directly in a folder, without kept photographs, and the names of the `others`, sorted."""

    images: list[Path]
    others: list[str]


def list_heap(folder: Path) -> Heap:
    """List the heap in *folder*, without what a server has written; raises `DataError`."""
    names = [entry.name for entry in list_folder(folder) if entry.is_file()]
    files = [folder / name for name in names if not kept_id(name)]

    heap = Heap([], [])
    for path in files:
        if is_image(path):
            heap.images.append(path)
        else:
            heap.others.append(path.name)

    return heap


class Suggestions:
    """The unit vectors of photographs by path, and the classes of those that are sorted.

    A thread computes the vectors; until then, or without *embed*, nothing is suggested.
    """

    def __init__(self, embed: Embed | None) -> None:
        self._embed = embed
        self._vectors: dict[Path, Vector] = {}
        self._classes: dict[Path, str] = {}  # of the sorted photographs
        self._asked: set[Path] = set()
        self.thread: threading.Thread | None = None

    def learn(self, folders: Mapping[str, Path]) -> None:
        """Add up to `MAX_LEARNED` photographs from each class's folder in *folders*."""
        if self._embed is None:
            return

        for name, folder in folders.items():
            for path in list_heap(folder).images[:MAX_LEARNED]:
                self._classes.setdefault(path, name)

    def compute(self, heap: Sequence[Path], rejected: Sequence[Path]) -> None:
        """Start a thread for the missing vectors of *heap*, with the sorted photographs, and of *rejected*.

        Does nothing without such photographs, or while an earlier thread runs.
        """
        if (
            self._embed is None
            or not (heap or len(rejected) > NEIGHBORS)
            or (self.thread is not None and self.thread.is_alive())
        ):
            return

        # Compute only the vectors that nobody has asked for yet.
        needed = [*self._classes, *heap, *rejected] if heap else rejected
        missing = [path for path in needed if path not in self._asked]
        self._asked.update(missing)
        self.thread = threading.Thread(
            target=self._run, args=(self._embed, missing), daemon=True
        )
        self.thread.start()

    def _run(self, embed: Embed, paths: Sequence[Path]) -> None:
        try:
            for path, vector in embed(paths):
                self._vectors[path] = vector
        except Exception as error:  # the page works without suggestions
            log.warning("no suggestions: %s", error)

    def move(self, path: Path, target: Path, name: str | None) -> None:
        """Follow a photograph from *path* to *target*, where it has the class *name*, or none for None."""
        self._classes.pop(path, None)
        if name is not None:
            self._classes[target] = name

        vector = self._vectors.pop(path, None)
        if vector is not None:
            self._vectors[target] = vector
            self._asked.add(target)

    def suggest(self, paths: Sequence[Path]) -> dict[Path, dict[str, float]]:
        """Suggest classes for those of the photographs at *paths* that have a vector: their probabilities.

        There are none for a single class, or if a class has fewer than `MIN_PHOTOGRAPHS`.
        """
        # The vectors of the photographs of each class.
        members: dict[str, list[Vector]] = {name: [] for name in self._classes.values()}
        for path, name in self._classes.items():
            if path in self._vectors:
                members[name].append(self._vectors[path])
        if len(members) < 2 or min(map(len, members.values())) < MIN_PHOTOGRAPHS:
            return {}

        # The cosines to the means of the classes are logits.
        means = np.stack([np.mean(vectors, axis=0) for vectors in members.values()])
        means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
        suggested = {}
        for path in paths:
            if path in self._vectors:
                probabilities = softmax(SCALE * (means @ self._vectors[path]))
                suggested[path] = dict(zip(members, probabilities.tolist(), strict=True))
        return suggested

    def group_alike(self, paths: Sequence[Path]) -> list[Path]:
        """Return those of the photographs at *paths* that look most alike, the one in their middle first.

        There are none if at most `NEIGHBORS` have a vector.
        """
        found = [path for path in paths if path in self._vectors]
        if len(found) <= NEIGHBORS:
            return []

        # Cosines of the deviations from the mean: all have in common what the camera sees.
        vectors = np.stack([self._vectors[path] for path in found])
        vectors -= vectors.mean(axis=0)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        cosines = vectors @ vectors.T

        nearest = np.sort(cosines, axis=1)[:, -NEIGHBORS - 1 :]  # with the photograph itself
        middle = int(nearest.sum(axis=1).argmax())
        order = np.argsort(-cosines[middle], kind="stable")[:MAX_GROUP]
        return [found[index] for index in order.tolist()]

    def most_similar(self, path: Path, others: Sequence[Path]) -> list[Path]:
        """Return the *others* that have a vector, the most similar to the photograph at *path* first.

        There are none if that one has no vector yet.
        """
        vector = self._vectors.get(path)
        if vector is None:
            return []
        cosines = {
            other: float(vector @ self._vectors[other])
            for other in others
            if other in self._vectors
        }
        return sorted(cosines, key=lambda other: -cosines[other])
