"""A heap: photographs of a folder that nobody has sorted, and suggestions for their classes.

As soon as each class has two photographs, the class of another one is suggested by the closest
class mean. A suggestion is no label: most of a heap may show none of the classes yet, and few sorted
photographs do not tell which ones (docs/decisions.md). The vectors come from a function that the
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
SCALE = 25.0  # of cosines as logits: 0.1 more makes a class 12 times as probable
_NONE: Vector = np.zeros((0, 0), np.float32)

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


class _Means(NamedTuple):
    """Classes `names` and their mean vectors (K, D) of length 1; none if a class has too few vectors.

    `state` has the number of vectors and that of changes of the classes when they were
    computed.
    """

    state: tuple[int, int]
    names: list[str]
    vectors: Vector


class Suggestions:
    """The unit vectors of photographs by path, and the classes of those that are sorted.

    A thread computes the vectors; until then, or without *embed*, nothing is suggested.
    """

    def __init__(self, embed: Embed | None) -> None:
        self._embed = embed
        self._vectors: dict[Path, Vector] = {}

        # The class of each sorted photograph, and its first path, under which it may have a
        # vector already.
        self._classes: dict[Path, tuple[str, Path]] = {}
        self._asked: set[Path] = set()
        self._num_changes = 0  # of the classes
        self._means = _Means((0, 0), [], _NONE)
        self.thread: threading.Thread | None = None

    def learn(self, folders: Mapping[str, Path]) -> None:
        """Add up to `MAX_LEARNED` photographs from each class's folder in *folders*."""
        if self._embed is None:
            return

        for name, folder in folders.items():
            for path in list_heap(folder).images[:MAX_LEARNED]:
                self._classes.setdefault(path, (name, path))
        self._num_changes += 1

    def compute(self, heap: Sequence[Path]) -> None:
        """Start a thread for the missing vectors of *heap* and the sorted photographs.

        Does nothing without a photograph in *heap*, or while an earlier thread runs.
        """
        if (
            self._embed is None
            or not heap
            or (self.thread is not None and self.thread.is_alive())
        ):
            return

        # Compute only the vectors that nobody has asked for yet.
        sorted_paths = [
            path for path, (_, first) in self._classes.items() if first not in self._vectors
        ]
        missing = [path for path in (*sorted_paths, *heap) if path not in self._asked]
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

    def add(self, name: str, path: Path, target: Path) -> None:
        """Add the photograph that was moved from *path* to *target* to the class *name*."""
        self._classes[target] = name, path
        self._num_changes += 1

    def move(self, path: Path, target: Path, name: str | None) -> None:
        """Follow the sorted photograph from *path* to *target*, of the class *name* or, for None, of none."""
        entry = self._classes.pop(path, None)
        if entry is not None and name is not None:
            self._classes[target] = name, entry[1]
        self._num_changes += 1

    def remove(self, target: Path) -> None:
        """Remove the photograph at *target*, whose label was undone, from its class."""
        self._classes.pop(target, None)
        self._num_changes += 1

    def suggest(self, path: Path) -> dict[str, float]:
        """Suggest classes for the photograph at *path*: their probabilities, or none yet."""
        means = self._class_means()
        vector = self._vectors.get(path)
        if vector is None or not means.names:
            return {}

        probabilities = softmax(SCALE * (means.vectors @ vector))
        return dict(zip(means.names, probabilities.tolist(), strict=True))

    def _class_means(self) -> _Means:
        """Return the means of the classes, of length 1, computed again if vectors or classes have changed.

        There are none for a single class, or if a class has fewer than `MIN_PHOTOGRAPHS`.
        """
        state = len(self._vectors), self._num_changes
        if self._means.state == state:
            return self._means

        # Collect the vectors of the photographs of each class.
        members: dict[str, list[Vector]] = {name: [] for name, _ in self._classes.values()}
        for path, (name, first) in self._classes.items():
            if (vector := self._vectors.get(first, self._vectors.get(path))) is not None:
                members[name].append(vector)

        # Compute the means, if there are enough of each class.
        if len(members) > 1 and min(map(len, members.values())) >= MIN_PHOTOGRAPHS:
            means = np.stack([np.mean(vectors, axis=0) for vectors in members.values()])
            self._means = _Means(state, list(members), _unit(means))
        else:
            self._means = _Means(state, [], _NONE)

        return self._means

    def most_probable(self, path: Path) -> tuple[str, float]:
        """Return the most probable class of the photograph at *path* with its probability, or ("", 0.0)."""
        return max(self.suggest(path).items(), key=lambda item: item[1], default=("", 0.0))

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


def _unit(vectors: Vector) -> Vector:
    """Scale *vectors* (K, D) to length 1."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, 1e-12)
