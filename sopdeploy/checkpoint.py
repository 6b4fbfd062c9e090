"""`ckpt.pt`: the only meeting point of training and export, and the only place that reads `.pt` files.

A checkpoint is one plain dict of tensors, numbers, strings, lists and dicts, so that
`torch.load(weights_only=True)` reads it without running code. It is written to a `.partial` name, flushed
to the disk and renamed, and the folder is flushed too: a power cut leaves the old file or the new one.
"""

import os
import pickle  # only for the name of the error that torch.load raises
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor

from sopdeploy.config import StrictModel, first_problem
from sopdeploy.errors import CheckpointError, ConfigError
from sopdeploy.files import atomic_write
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import Classifier
from sopdeploy.models.registry import create_model, make_config

FORMAT = "sopdeploy-checkpoint"
VERSION = 1


class ModelRecord(StrictModel):
    """Which network of the catalog the weights belong to, with every switch of its config."""

    name: str
    config: dict[str, Any]


class Header(StrictModel):
    """Everything in a checkpoint but its tensors."""

    format: Literal["sopdeploy-checkpoint"]
    version: Literal[1]
    model: ModelRecord
    labels: tuple[str, ...] = pydantic.Field(min_length=1)
    preprocess: Preprocess
    training: dict[str, Any]

    @pydantic.field_validator("labels")
    @classmethod
    def _labels_differ(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(labels)) != len(labels):
            raise ValueError("two classes have the same name")
        return labels


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A trained network with what is needed to use it.

    `weights` is the state dict of the whole training network (averaged weights if averaging was on);
    `training` records recipe, epoch, best figures, seed and versions; `resume` holds optimizer,
    scheduler and random states, or `None` in a checkpoint that is only to be used.
    """

    model: str
    config: dict[str, Any]
    weights: dict[str, Tensor]
    labels: tuple[str, ...]
    preprocess: Preprocess
    training: dict[str, Any]
    resume: dict[str, Any] | None = None


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write *checkpoint* to *path*, all or nothing; raises `CheckpointError` where it cannot."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model": {"name": checkpoint.model, "config": checkpoint.config},
        "weights": {name: tensor.detach().cpu() for name, tensor in checkpoint.weights.items()},
        "labels": list(checkpoint.labels),
        "preprocess": checkpoint.preprocess.model_dump(mode="json"),
        "training": checkpoint.training,
    }
    if checkpoint.resume is not None:
        content["resume"] = checkpoint.resume
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial, partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        flush_folder(path.parent)
    except (OSError, RuntimeError) as problem:
        full = f"; is there room in {path.parent}?" if isinstance(problem, RuntimeError) else ""
        raise CheckpointError(f"{path}: cannot be written ({problem}){full}") from problem


def flush_folder(folder: Path) -> None:
    """Bring the names in *folder* to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint at *path*, its tensors on the CPU.

    Raises `CheckpointError` for a missing or damaged file, another format, or one that would need to
    run code to be read.
    """
    content = load_plain(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not a sopdeploy checkpoint; `sopdeploy train` writes them, weights of other "
            "projects have to be imported (`sopdeploy import`)"
        )
    weights, resume = content.pop("weights", None), content.pop("resume", None)
    try:
        header = Header.model_validate(content)
    except pydantic.ValidationError as problem:
        raise CheckpointError(f"{path}: {first_problem(problem)}; train or import it again") from problem
    if not is_state_dict(weights):
        raise CheckpointError(f"{path}: its weights are not a table of tensors; train or import it again")
    return Checkpoint(
        model=header.model.name,
        config=header.model.config,
        weights=weights,
        labels=header.labels,
        preprocess=header.preprocess,
        training=header.training,
        resume=resume,
    )


def load_plain(path: Path, advice: str = "only open checkpoints that sopdeploy wrote") -> Any:
    """Return what `torch.load(weights_only=True)` reads from *path*: never runs code of the file.

    *advice* ends the refusal of a file that would need to run code.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: {why_no_file(path)}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as problem:
        raise CheckpointError(f"{path}: cannot be read ({problem.strerror or problem})") from problem
    except pickle.UnpicklingError as problem:
        raise CheckpointError(
            f"{path}: refused, it is no plain table of tensors and reading it could run code; {advice}"
        ) from problem
    except Exception as problem:  # whatever a damaged file makes of torch's readers
        raise CheckpointError(f"{path}: damaged or not a checkpoint; copy or train it again") from problem


def why_no_file(path: Path) -> str:
    """Return what is at *path* in place of a checkpoint, and what to give instead."""
    if (path / "manifest.json").is_file():
        return "a bundle, which was exported already; give the best.pt of a training run"
    if (path / "best.pt").is_file():
        return f"a folder; give {path / 'best.pt'}"
    return "no such file; give the best.pt of a training run"


def is_state_dict(weights: Any) -> bool:
    """Say whether *weights* is a non-empty table of names and tensors."""
    return (
        isinstance(weights, dict)
        and len(weights) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items())
    )


def storage(tensor: Tensor) -> str:
    """Return how the numbers of *tensor* are stored, such as `float32 strided on cpu`."""
    return f"{tensor.dtype} {tensor.layout} on {tensor.device}".replace("torch.", "")


def build_classifier(checkpoint: Checkpoint, where: Path) -> Classifier:
    """Return the network of *checkpoint* with its weights, in eval mode.

    Raises `CheckpointError` naming *where* and the first tensor that is missing, unknown, of another
    shape or dtype, or not finite.
    """
    try:
        make_config(checkpoint.model, checkpoint.config)  # a key may be named as an argument of create_model
        network = create_model(checkpoint.model, num_classes=len(checkpoint.labels), **checkpoint.config)
    except ConfigError as problem:
        raise CheckpointError(f"{where}: {problem}") from problem
    expected = network.state_dict()
    for name, tensor in expected.items():
        if name not in checkpoint.weights:
            raise CheckpointError(f"{where}: {checkpoint.model} needs a tensor {name}, which is missing")
        found = checkpoint.weights[name]
        if found.shape != tensor.shape:
            raise CheckpointError(f"{where}: {name} is {tuple(found.shape)}, not {tuple(tensor.shape)}")
        if storage(found) != storage(tensor):
            raise CheckpointError(f"{where}: {name} is {storage(found)}, not {storage(tensor)}")
        if found.is_floating_point() and not bool(torch.isfinite(found).all()):
            raise CheckpointError(f"{where}: {name} has values that are not finite; train again")
    unknown = sorted(checkpoint.weights.keys() - expected.keys())
    if unknown:
        raise CheckpointError(f"{where}: {checkpoint.model} has no tensor {unknown[0]}")
    network.load_state_dict(checkpoint.weights)
    return network.eval()
