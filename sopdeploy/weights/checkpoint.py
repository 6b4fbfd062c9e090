"""Checkpoint files (`.pt`), the interface between training and export, and weight files that users bring.

Both are dicts of tensors, numbers, strings, lists and dicts, so `torch.load(weights_only=True)`
reads them without running code. Writing flushes a `.partial` file, renames it and flushes the
folder, so after a power failure either the old or the new file exists. No other module loads
`.pt` files.
"""

import hashlib
import io
import pickle  # for the exception type of torch.load
import zipfile
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, assert_never

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
from sopdeploy.base.environment import import_optional
from sopdeploy.base.file_systems import flush_folder
from sopdeploy.base.files import advise_on, atomic_write, new_folder, read_file, writing
from sopdeploy.base.names import Labels, ProjectName
from sopdeploy.base.project import Origin
from sopdeploy.bundle.decision import Decision
from sopdeploy.errors import CheckpointError, ConfigError, WeightsError, first_line
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import IMAGES_FORMAT
from sopdeploy.models.base import Classifier
from sopdeploy.models.registry import create_model, make_config
from sopdeploy.paths import CHECKPOINT_FORMAT, MAX_WEIGHTS_BYTES, weight_format
from sopdeploy.version import __version__
from sopdeploy.weights.files import WeightPath, check_is_checkpoint
from sopdeploy.weights.pickled import PLAIN_TYPES, StoredArray, check_pickles, distinct_values

_VERSION = 1
WEIGHTS_ADVICE = "save the network's state_dict() alone with torch.save, or as safetensors"
_MAX_BYTES = 4 << 30  # of all tensors of such a file; the largest published one has 0.7 GB
MAX_TENSORS = 1_000_000
# Of a batch norm; old files lack it, and inference does not use it
COUNTER = "num_batches_tracked"
# Of batch norms, `AveragedModel` and packages that count operations; no output depends on them.
COUNTERS = (COUNTER, "n_averaged", "total_ops", "total_params")
# Numbers and parameters that a network may have while it is built, besides multiples of the file's.
_MORE_NUMBERS = 1 << 28
_MORE_PARAMETERS = 20_000
MAX_TABLE_LEVELS = 3  # of dicts, as in {"checkpoint": {"model": {"conv.weight": ..}}}


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
                _is_dense(value) and _stores_all_numbers(value)
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


def load_plain(
    path: Path, raw: bytes, advice: str = "only open checkpoints that sopdeploy wrote"
) -> Any:
    """Load *raw*, the content of *path*, by `torch.load(weights_only=True)`, which never runs code from it.

    Raises `CheckpointError` if it is a TorchScript archive, is damaged, takes much more memory
    than its size explains, or would run code; the message of the last ends in *advice*.
    """
    if _is_torchscript(raw):
        raise CheckpointError(
            f"{path}: a TorchScript archive, which contains code; {WEIGHTS_ADVICE}"
        )

    try:
        _check_reading_cost(raw)
        content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        distinct_values(content)  # raises if it has too many values or levels
        return content
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, because it contains objects other than "
            f"tensors, and reading it could run code; {advice}"
        ) from error
    except Exception as error:  # torch raises many types for damaged files
        raise CheckpointError(
            f"{path}: damaged or not a checkpoint; copy it again, or train again"
        ) from error


def _is_torchscript(raw: bytes) -> bool:
    """Return whether *raw* is an archive of `torch.jit.save`, which stores constants beside the code."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except Exception:  # no zip archive, or a damaged one, which a later check reports
        return False
    return "constants.pkl" in names and "data.pkl" in names


def _check_reading_cost(raw: bytes) -> None:
    """Raise `ValueError` if reading *raw* may take more memory or time than its size explains."""
    if not raw.startswith(b"PK"):
        check_pickles(io.BytesIO(raw))
        return

    # The reader that `torch.load` uses. Another reader of zip files may find other entries: names
    # that differ in case only, or a second list of entries.
    reader = torch._C.PyTorchFileReader(io.BytesIO(raw))
    if hasattr(reader, "get_record_size"):
        size = sum(map(reader.get_record_size, reader.get_all_records()))
    else:  # torch 2.11
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            size = sum(file.file_size for file in archive.infolist())

    if size > len(raw):
        raise ValueError("compressed or overlapping entries")
    check_pickles(io.BytesIO(reader.get_record("data.pkl")))


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta


def _stores_all_numbers(tensor: Tensor) -> bool:
    """Check whether the dense *tensor* has memory for all its numbers: with strides of 0 it may have less."""
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def is_state_dict(weights: Any) -> bool:
    """Check whether *weights* is a non-empty dict of names and tensors."""
    if not isinstance(weights, dict) or not weights:
        return False
    return all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items()
    )


def read_pytorch(file: WeightPath) -> tuple[Any, str]:
    """Read a file of torch or safetensors; returns content and sha256, raises `WeightsError`.

    In a file of torch, arrays of numpy in the outer dicts become tensors.
    """
    path = file.path
    try:
        raw = read_file(path, MAX_WEIGHTS_BYTES)
    except OSError as error:
        raise WeightsError(f"{path}: {advise_on(error, WEIGHTS_ADVICE)}") from error
    digest = hashlib.sha256(raw).hexdigest()

    # safetensors has tensors alone, a file of torch may hold them in tables.
    file_format = weight_format(raw[:16])
    if file_format == "safetensors":
        safetensors = import_optional(
            "safetensors.torch", "safetensors", "sopdeploy[train]", WeightsError, str(path)
        )
        try:
            return safetensors.load(raw), digest
        except Exception as error:  # `SafetensorError`, of a package that is imported above
            raise WeightsError(
                f"{path}: damaged safetensors file ({error}); copy it again"
            ) from error

    # A file of neither format goes on, too: `load_plain` says what is wrong with it.
    if file_format != "torch" and file_format is not None:
        assert_never(file_format)

    try:
        with torch.serialization.safe_globals(list(PLAIN_TYPES)):
            return _arrays_to_tensors(load_plain(path, raw, WEIGHTS_ADVICE)), digest
    except CheckpointError as error:
        raise WeightsError(str(error)) from error


def _arrays_to_tensors(content: Any, levels: int = MAX_TABLE_LEVELS) -> Any:
    """Replace the arrays of numpy in the outer *levels* of dicts by tensors, if they hold numbers."""
    if isinstance(content, StoredArray) and content.values is not None:
        return torch.from_numpy(content.values)
    if isinstance(content, dict) and levels:
        return {key: _arrays_to_tensors(value, levels - 1) for key, value in content.items()}
    return content


def find_tables(content: Any, levels: int = MAX_TABLE_LEVELS) -> dict[str, Mapping[str, Any]]:
    """Find the tables of tensors in the outer *levels* of *content*, by their path of keys, "" for itself.

    A table is a dict that holds a tensor; it can hold other values, too, such as the extra
    state of a layer or the number of epochs.
    """
    if not isinstance(content, dict):
        return {}

    tables: dict[str, Mapping[str, Any]] = {}
    own = {name: value for name, value in content.items() if isinstance(name, str)}
    if any(isinstance(value, Tensor) for value in own.values()):
        tables[""] = own

    if levels > 1:
        for key, value in content.items():
            for path, table in find_tables(value, levels - 1).items():
                tables[f"{key}.{path}".strip(".")] = table
    return tables


def find_wrappers(*tables: Iterable[str]) -> frozenset[str]:
    """Return the parts of the names in *tables* that wrappers of modules add, such as `_orig_mod`.

    DataParallel calls what it wraps `module`; torch.compile, FSDP, checkpoints of activations
    and others use a name that begins with an underscore. A part is that of a wrapper only if it
    stands alone wherever it occurs: no other part follows the same prefix, but for counters.
    """
    siblings = defaultdict[tuple[int, str], set[str]](set)

    # By table and prefix, the parts that follow this prefix in the names of the table.
    for number, names in enumerate(tables):
        for name in names:
            if name.endswith(COUNTERS):
                continue
            parts = name.split(".")
            for depth, part in enumerate(parts):
                siblings[number, ".".join(parts[:depth])].add(part)

    alone = {part for parts in siblings.values() if len(parts) == 1 for part in parts}
    shared = {part for parts in siblings.values() if len(parts) > 1 for part in parts}
    return frozenset(
        part for part in alone - shared if part == "module" or part.startswith("_")
    )


def without_wrappers(name: str, wrappers: Container[str]) -> str:
    """Leave *wrappers* out of *name*, as in module.conv1.weight or features.module.0.weight."""
    return ".".join(part for part in name.split(".") if part not in wrappers)


def find_labels(content: Any) -> tuple[str, ...] | None:
    """Read the class names in the order of `class_to_idx`, as torchvision's folders number them, if any."""
    number_by_name = content.get("class_to_idx") if isinstance(content, dict) else None

    if not isinstance(number_by_name, dict) or not all(
        isinstance(name, str) for name in number_by_name
    ):
        return None

    name_by_number = {
        number: name for name, number in number_by_name.items() if isinstance(number, int)
    }

    if sorted(name_by_number) != list(range(len(number_by_name))):
        return None
    return tuple(name for _, name in sorted(name_by_number.items()))


def check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check that the *tensors* of a weight file are dense, real and not too large in total; raises `WeightsError`.

    Returns a copy of the mapping. With strides of 0, a few bytes can declare a tensor of any
    shape.
    """
    total = 0

    for name, tensor in tensors.items():
        if not _is_dense(tensor) or tensor.is_complex():
            raise WeightsError(
                f"{path}: {name} is not a dense tensor of real numbers; save it as float32"
            )
        total += tensor.numel() * tensor.element_size()
        if total > _MAX_BYTES:
            raise WeightsError(
                f"{path}: its tensors have more than {_MAX_BYTES >> 30} GiB, which is the limit"
            )
    return dict(tensors)


def _describe_type(tensor: Tensor) -> str:
    """Describe dtype, layout and device, such as "float32 strided on cpu"."""
    return f"{tensor.dtype} {tensor.layout} on {tensor.device}".replace("torch.", "")


@contextmanager
def _limit_parameters(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Raise `ValueError` if the block creates many more parameters than *weights* can fill.

    A few bytes of a config can ask for any width or number of blocks. Parameters are counted
    before they get values, so they take no memory yet. A network may replace some of them while it
    is built, so the limits exceed what the file has.
    """
    stored = [tensor.untyped_storage() for tensor in weights.values() if _is_dense(tensor)]
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
        if _describe_type(actual) != _describe_type(tensor):
            return f"{name} is {_describe_type(actual)}, not {_describe_type(tensor)}"
        if actual.is_floating_point() and not bool(torch.isfinite(actual).all()):
            return f"{name} has values that are not finite"

    unknown = sorted(weights.keys() - expected.keys())
    return f"the network has no {unknown[0]}" if unknown else ""
