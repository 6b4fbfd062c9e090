"""What every network of the catalog is: a backbone that knows what only its training needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from sopdeploy.backbones.base import Backbone
from sopdeploy.config import StrictModel


class TrainingOutput(NamedTuple):
    """What a network with training-only parts returns in train mode.

    `logits` (B, classes) come from the part that ships; `branches` maps each training-only head to
    its (B, classes) logits; `penalties` maps names to scalars that are added to the loss as they are.
    """

    logits: Tensor
    branches: dict[str, Tensor]
    penalties: dict[str, Tensor]


class Classifier(Backbone):
    """A network of the catalog.

    `training_only` holds the dotted names of the parts that may leave before it ships: in eval mode
    `forward` never touches them and returns (B, classes) logits. In train mode `forward` returns a
    `TrainingOutput` where there are such parts, else the logits.
    """

    training_only: ClassVar[tuple[str, ...]] = ()

    def inference_model(self) -> Backbone:
        """Return the network that should ship, built anew from the config, with fresh weights.

        It shares no object with this one: the certificate compares the two.
        """
        raise TypeError(f"{type(self).__name__} must say what ships")

    def heads(self, images: Tensor) -> dict[str, Tensor]:
        """Return the (B, classes) logits of every head, `main` and those that only training needs."""
        return {"main": self(images)}

    def loss_weights(self) -> dict[str, float]:
        """Return the weight of each head's loss: `main` and the names in `branches`."""
        return {"main": 1.0}

    def num_features(self) -> int:
        """Return the length of the vector that the shipped classifier sees."""
        raise TypeError(f"{type(self).__name__} must say how long its representation is")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One line of the catalog; `image_size` is the side of the images its paper uses, in pixels."""

    network: type[Classifier]
    config: type[StrictModel]
    defaults: Mapping[str, Any]
    image_size: int
    num_classes: int
    summary: str
