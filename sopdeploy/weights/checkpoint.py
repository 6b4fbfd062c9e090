"""Checkpoint files (`.pt`), the interface between training and export.

Writing flushes a `.partial` file, renames it and flushes the folder, so after a power failure
either the old or the new file exists.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import pydantic
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from sopdeploy.base.config import (
    FieldValues,
    Text,
    check_format,
    check_is_readable,
    first_problem,
    version_advice,
    writer_of,
)
from sopdeploy.base.file_systems import flush_folder
from sopdeploy.base.files import advise_on, atomic_write, new_folder, read_file, writing
from sopdeploy.base.names import Labels, ProjectName
from sopdeploy.base.project import Origin
from sopdeploy.bundle.decision import Decision
from sopdeploy.errors import CheckpointError, ConfigError, first_line
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import IMAGES_FORMAT
from sopdeploy.models.base import Classifier
from sopdeploy.models.registry import create_model, make_config
from sopdeploy.paths import CHECKPOINT_FORMAT, MAX_WEIGHTS_BYTES
from sopdeploy.version import __version__
from sopdeploy.weights.files import check_is_checkpoint
from sopdeploy.weights.pickled import distinct_values
from sopdeploy.weights.tensor_files import (
    MAX_TENSORS,
    describe_type,
    is_dense,
    load_plain,
    stores_all_numbers,
)

_VERSION = 1
# Numbers and parameters that a network may have while it is built, besides multiples of the file's.
_MORE_NUMBERS = 1 << 28
_MORE_PARAMETERS = 20_000


class TrainingRecord(TypedDict, total=False):
    """How weights were trained or where they come from; `procedure` is the result of a run, with its `warnings`."""

    recipe: FieldValues
    images_format: str
    start: FieldValues
    seed: int
    epoch: int
    step: int
    weights: Literal["raw", "average"]
    metrics: FieldValues | None
    procedure: FieldValues
    warnings: list[str]
    versions: dict[str, str]
    plugins: dict[str, str]
    machine: FieldValues
    imported_from: str
    imported_sha256: str
    imported_project: str


@dataclass(
    frozen=True,
    kw_only=True,
    slots=True,
    config=pydantic.ConfigDict(arbitrary_types_allowed=True, extra="forbid"),
)
class Checkpoint:
    """A trained network and everything needed to use it.

    Attributes:
        config: keyword arguments of `create_model`.
        weights: state dict of the training network; the averaged weights if EMA was enabled.
        labels: class names in output order.
        training: a `TrainingRecord`; a file can contain anything.
        resume: what `training.checkpoints` adds to `last.pt`; `None` if training cannot be resumed from it.
        image_hashes: sorted hashes (N,) int64 of the files of the training images; empty if unknown.
        decision: how logits become a decision; `None` is softmax without calibration or rejection.
        project: name of the project; empty for imported weights.
        origin: the run and its images; `None` for imported weights.
        sha256: hash of the bytes that `read_checkpoint` read; empty for a checkpoint that is not from a file.
    """

    model: Text
    config: FieldValues
    weights: Annotated[dict[Text, Tensor], pydantic.Field(max_length=MAX_TENSORS)]
    labels: Labels
    preprocess: Preprocess
    training: Mapping[str, Any]
    resume: Mapping[str, Any] | None = None
    decision: Decision | None = None
    project: ProjectName | Literal[""] = ""
    origin: Origin | None = None
    image_hashes: Tensor = field(
        default_factory=lambda: torch.zeros(0, dtype=torch.int64), compare=False
    )
    sha256: str = field(default="", compare=False)

    @pydantic.model_validator(mode="after")
    def _check_lengths(self) -> "Checkpoint":
        if self.image_hashes.dtype != torch.int64 or self.image_hashes.ndim != 1:
            raise ValueError("image_hashes: not a list of int64 numbers")

        problem = (
            None if self.decision is None else self.decision.problem_with(len(self.labels))
        )
        if problem is not None:
            raise ValueError(f"decision: {problem}")
        return self


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write *checkpoint* to *path* atomically; raise `StorageError` on failure."""
    write_plain(path, plain_content(checkpoint))


def plain_content(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the content of the file of *checkpoint*, which `parse_checkpoint` reads."""
    decision = checkpoint.decision
    origin = checkpoint.origin

    content = {
        "format": CHECKPOINT_FORMAT,
        "version": _VERSION,
        # All fields, of which the four below are replaced.
        **{field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)},
        "weights": {name: tensor.detach().cpu() for name, tensor in checkpoint.weights.items()},
        "preprocess": checkpoint.preprocess.model_dump(mode="json"),
        "decision": None if decision is None else decision.model_dump(mode="json"),
        "origin": None if origin is None else origin.written_fields(),
    }

    del content["sha256"]  # a file cannot contain its own
    return content


def write_plain(path: Path, content: Mapping[str, Any]) -> None:
    """Write *content*, which `load_plain` can read, to *path* atomically; raises `StorageError`."""
    with writing(path), new_folder(path.parent):
        with atomic_write(path, durable=True) as partial, partial.open("wb") as file:
            try:
                torch.save(dict(content), file)
            except RuntimeError as error:  # if the disk is full
                raise OSError("the file is not complete") from error
        flush_folder(path.parent)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the checkpoint at *path* with all tensors on the CPU.

    After a look at what the file is, its content is read once, so `sha256` matches it even if
    another process replaces the file. Raises `CheckpointError` if the file is missing, damaged, not a sopdeploy
    checkpoint, or would run code.
    """
    check_is_checkpoint(path)

    try:
        raw = read_file(path, MAX_WEIGHTS_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: {advise_on(error, 'copy it again')}") from error
    return parse_checkpoint(path, load_plain(path, raw), hashlib.sha256(raw).hexdigest())


def parse_checkpoint(path: Path, content: Any, digest: str) -> Checkpoint:
    """Build the checkpoint of the *content* of the file at *path*, which has the sha256 *digest*.

    Removes format and version from *content*. Raises `CheckpointError` if it is not a checkpoint
    or is invalid.
    """
    if not isinstance(content, dict) or content.pop("format", None) != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{path}: not a sopdeploy checkpoint; `sopdeploy train` writes them; "
            "use `sopdeploy import` for published weights, and `export --network` "
            "for your own network"
        )

    written_by = writer_of(content.get("training"))

    # Only the weights may have tensors that share or lack values; `build_classifier` checks them.
    for name in content.keys() - {"weights"}:
        for value in distinct_values(content[name]):
            if isinstance(value, Tensor) and not (
                is_dense(value) and stores_all_numbers(value)
            ):
                where = f"{path}: {str(name)[:80]}"
                raise CheckpointError(
                    f"{where}: has a tensor without values of its own; copy it again"
                )

    # Fields of a later version are unknown here; the error names the version that knows them. In a
    # file of this version, the validation below refuses them.
    version = content.pop("version", None)
    training = content.get("training")
    unknown = [
        str(name) for name in content.keys() - {field.name for field in fields(Checkpoint)}
    ]
    if isinstance(training, dict):
        unknown += [
            f"training.{name}"
            for name in training.keys() - TrainingRecord.__annotations__.keys()
        ]

    is_of_other_version = isinstance(written_by, str) and written_by != __version__
    try:
        check_is_readable(written_by, "train or import it again")
        check_format(version, _VERSION, written_by, unknown if is_of_other_version else ())
        return pydantic.TypeAdapter(Checkpoint).validate_python({**content, "sha256": digest})
    except pydantic.ValidationError as error:
        problem = first_problem(error, content) + (
            version_advice(written_by) or "; train or import it again"
        )
        raise CheckpointError(f"{path}: {problem}") from error
    except ValueError as error:  # of another version
        raise CheckpointError(f"{path}: {error}") from error


@contextmanager
def _limit_parameters(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Raise `ValueError` if the block creates many more parameters than *weights* can fill.

    A few bytes of a config can ask for any width or number of blocks. Parameters are counted
    before they get values, so they take no memory yet. A network may replace some of them while it
    is built, so the limits exceed what the file has.
    """
    stored = [tensor.untyped_storage() for tensor in weights.values() if is_dense(tensor)]
    # Tensors may share a storage, which counts once.
    bytes_by_address = {storage.data_ptr(): storage.nbytes() for storage in stored}
    left_numbers = _MORE_NUMBERS + 2 * sum(bytes_by_address.values())
    left_parameters = _MORE_PARAMETERS + 10 * len(weights)

    def count(_module: object, _name: str, parameter: Tensor) -> None:
        nonlocal left_numbers, left_parameters
        left_numbers -= parameter.numel()
        left_parameters -= 1
        if left_numbers < 0 or left_parameters < 0:
            raise ValueError("it has many more weights than the file")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def build_classifier(checkpoint: Checkpoint, path: Path) -> Classifier:
    """Build the network of *checkpoint* with its weights, in eval mode.

    Its attribute `images_format` is the layout of the images that it was trained with. Raises
    `CheckpointError` naming *path* if the network cannot be built, or the first tensor that does
    not fit.
    """
    try:
        make_config(checkpoint.model, checkpoint.config)  # rejects keys such as num_classes
        with _limit_parameters(checkpoint.weights):
            network = create_model(
                checkpoint.model, num_classes=len(checkpoint.labels), **checkpoint.config
            )
    except ConfigError as error:
        raise CheckpointError(
            f"{path}: {error}{version_advice(writer_of(checkpoint.training))}"
        ) from error
    # What torch and Python raise for sizes that no network can have.
    except (ArithmeticError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{checkpoint.model} cannot be built with its config ({first_line(error)})"
        raise CheckpointError(f"{path}: {reason}; train or import it again") from error

    weights = dict(checkpoint.weights)
    problem = first_difference(network.state_dict(), weights)
    if problem:
        advice = version_advice(writer_of(checkpoint.training)) or "; train or import it again"
        raise CheckpointError(f"{path}: {checkpoint.model}: {problem}{advice}")
    network.load_state_dict(weights)

    # The layout of the training images; channels-last, unless the checkpoint says the other one.
    is_contiguous = checkpoint.training.get(IMAGES_FORMAT) == "contiguous_format"
    vars(network)[IMAGES_FORMAT] = (
        torch.contiguous_format if is_contiguous else torch.channels_last
    )
    return network.eval()


def first_difference(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """Describe the first tensor of *weights* that does not fit *expected*; empty if all do."""
    for name, tensor in expected.items():
        if name not in weights:
            return f"{name} is missing"
        actual = weights[name]
        if actual.shape != tensor.shape:
            return f"{name} is {tuple(actual.shape)}, not {tuple(tensor.shape)}"
        if describe_type(actual) != describe_type(tensor):
            return f"{name} is {describe_type(actual)}, not {describe_type(tensor)}"
        if actual.is_floating_point() and not bool(torch.isfinite(actual).all()):
            return f"{name} has values that are not finite"

    unknown = sorted(weights.keys() - expected.keys())
    return f"the network has no {unknown[0]}" if unknown else ""
