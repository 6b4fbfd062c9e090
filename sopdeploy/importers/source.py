"""What every source is: it recognises its project's files and says their tensors' names here."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from sopdeploy.importers.weight_file import WeightFile
from sopdeploy.preprocess import Preprocess

LabelSet = Literal["imagenet", "cifar10"]


class Mapped(NamedTuple):
    """One tensor of a network here: from which of the file's it was made, and how."""

    ours: str
    theirs: tuple[str, ...]
    tensor: Tensor
    how: str = "as it is"


@dataclass(frozen=True, kw_only=True, slots=True)
class Translation:
    """A weight file in the words of the catalog.

    `looks_like` says in words what network it is, `name` what the catalog calls it (with the settings it
    takes), `None` where it has none. `must` are values, by dotted keys, that the config of the chosen
    name has to have. `read` are switches that the file itself holds, `usual` those that only the
    project's code holds; `ask` those that neither does, with the reason. `labels` is the order of
    classes where it is a known one.
    """

    looks_like: str
    name: str | None
    mapped: tuple[Mapped, ...]
    num_classes: int
    preprocess: Preprocess
    must: Mapping[str, Any] = field(default_factory=dict)
    read: Mapping[str, Any] = field(default_factory=dict)
    usual: Mapping[str, Any] = field(default_factory=dict)
    ask: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    labels: LabelSet | None = None
    notes: tuple[str, ...] = ()


class Source(Protocol):
    """One project whose files can be imported."""

    project: str

    def recognises(self, file: WeightFile, name: str) -> bool:
        """Say whether *file*, to be imported as catalog model *name*, is one of this project's."""

    def translate(self, file: WeightFile, name: str) -> Translation:
        """Return *file* in the words of the catalog; raises `WeightsError`."""


def renamed(file: WeightFile, place: Callable[[str], str | None]) -> tuple[Mapped, ...]:
    """Return every tensor of *file* for which *place* knows a name here, unchanged."""

    def places() -> Iterator[Mapped]:
        for theirs, tensor in file.tensors.items():
            ours = place(theirs)
            if ours is not None:
                yield Mapped(ours, (theirs,), tensor)

    return tuple(places())
