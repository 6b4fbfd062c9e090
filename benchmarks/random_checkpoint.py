"""Checkpoints of networks with random weights, for benchmarks that export them."""

from pathlib import Path

from sopdeploy.checkpoint import Checkpoint, write_checkpoint
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import Classifier

CLASSES = tuple(f"class {number}" for number in range(1000))


def checkpoint(
    name: str,
    network: Classifier,
    folder: Path,
    side: int | None = None,
    labels: tuple[str, ...] = CLASSES,
) -> Path:
    """Write *network* as a checkpoint, for images of 224 pixels or *side*."""
    path = folder / f"{name}.pt"
    write_checkpoint(
        path,
        Checkpoint(
            model=name,
            config=network.config.model_dump(mode="json"),
            weights=network.state_dict(),
            labels=labels,
            preprocess=Preprocess() if side is None else Preprocess(resize=side, crop=side),
            training={},
        ),
    )
    return path
