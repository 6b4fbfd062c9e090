"""One line of the catalog."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sopdeploy.frozen import Frozen
from sopdeploy.models.base import Classifier


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One line of the catalog; `image_size` is the side of the images its paper uses, in pixels."""

    network: type[Classifier]
    config: type[Frozen]
    defaults: Mapping[str, Any]
    image_size: int
    num_classes: int
    summary: str
