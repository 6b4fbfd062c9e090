"""Weight files, converted weights, and their match with the network that the user named."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sopdeploy.base.config import FieldValues, StrictModel
from sopdeploy.base.plugins import IMPORTERS
from sopdeploy.errors import ConfigError, WeightsError, shorten
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import create_model, entry, make_config
from sopdeploy.weights.checkpoint import first_difference
from sopdeploy.weights.tensor_files import COUNTER


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFile:
    """Content of a weight file; tensor names have no data-parallel prefixes.

    `sha256` is the hash of the file, `others` are the names in its table that no tensor has. `arch`
    is the architecture name that PyTorch training scripts store, `labels` are the class names
    of its `class_to_idx`.
    """

    path: Path
    sha256: str
    tensors: Mapping[str, Tensor]
    others: tuple[str, ...] = ()
    arch: str | None = None
    labels: tuple[str, ...] | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """Say what the table holds beside tensors."""
        return (f"ignored, as no tensors: {shorten(self.others)}",) if self.others else ()

    def tensor(self, name: str) -> Tensor:
        """Get the tensor *name*; raises `WeightsError` if the file has none."""
        if name not in self.tensors:
            raise WeightsError(f"{self.path}: has no {name}; give the file of a whole network")
        return self.tensors[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertedWeights:
    """A weight file with the tensor names and settings of the catalog.

    `model` is the catalog name (with settings), None if the catalog has no such network.
    `detected` are config values read from the file, by dotted key, `defaults` those fixed by
    the project's code. `triangles` maps the tensors whose last axis is the triangle of a matrix
    to its number of rows, and `by_columns` is the order in the project's files: column by
    column, or else row by row. `undetermined` maps keys that the user must set, because neither
    the file nor the code determines them, to the reason. `num_classes` is 0 for a file without
    a classifier. `class_names` are the names in the project's data, if the file has as many
    classes. If `imagenet` is set, 1000 classes without names are ImageNet's.
    """

    project: str
    description: str
    model: str | None
    tensors: Mapping[str, Tensor]
    num_classes: int
    preprocess: Preprocess = field(default_factory=Preprocess)
    detected: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    undetermined: Mapping[str, str] = field(default_factory=dict)
    triangles: Mapping[str, int] = field(default_factory=dict)
    by_columns: bool = False
    class_names: tuple[str, ...] = ()
    imagenet: bool = True
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Importer:
    """Reads the published weight files of a project.

    Attributes:
        marks: `convert` is called only for files in which the name of a tensor contains one of these.
        convert: Takes a file and the catalog name that the user gave, and returns None for files of other
            projects.
        magic: The first bytes of files of the format, if it is neither torch's nor safetensors.
        read: Takes the path and the sha256 of such a file.

    Examples:
        >>> importer = sopdeploy.Importer(marks=("acme.",), convert=lambda file, name: None)
        >>> importer.magic is None
        True
    """

    marks: tuple[str, ...]
    convert: Callable[[WeightFile, str], ConvertedWeights | None]
    magic: bytes | None = None
    read: Callable[[Path, str], WeightFile] | None = None


def register_importer(name: str, importer: Importer) -> None:
    """Let `sopdeploy import`, and training from weights, read the files of another project.

    Args:
        name: A name for messages.
        importer: What reads the files. Importers of sopdeploy come first.

    Raises:
        ConfigError: *name* is invalid or in use.

    Examples:
        The file of this project has the tensors of a ResNet-18, each behind `acme.`.

        >>> from sopdeploy.weights.conversion import ConvertedWeights
        >>> def convert(file, name):
        ...     tensors = {key.removeprefix("acme."): file.tensors[key] for key in file.tensors}
        ...     return ConvertedWeights(
        ...         project="acme",
        ...         description="acme",
        ...         model="resnet18",
        ...         tensors=tensors,
        ...         num_classes=len(tensors["fc.bias"]),
        ...     )
        >>> importer = sopdeploy.Importer(marks=("acme.",), convert=convert)
        >>> sopdeploy.register_importer("acme", importer)
        >>> trained = sopdeploy.create_model("resnet18", 3)
        >>> state = {f"acme.{key}": value for key, value in trained.state_dict().items()}
        >>> torch.save(state, "acme.pth")
        >>> network = sopdeploy.create_model("resnet18", 3, pretrained="acme.pth")
        >>> torch.equal(network.fc.weight, trained.fc.weight)
        True
    """
    IMPORTERS.register(name, importer, importer.convert.__module__)


def rename_tensors(file: WeightFile, renames: Mapping[str, str]) -> dict[str, Tensor]:
    """Replace in each tensor name of *file* the first key of *renames* that it contains; other names stay."""
    renamed = {}
    for name, tensor in file.tensors.items():
        old = next((part for part in renames if part in name), None)
        renamed[name if old is None else name.replace(old, renames[old], 1)] = tensor
    return renamed


# keys whose values the network that the user names must have; others become those of the file
IDENTITY = {
    "depth",
    "pooling.kind",
    "final_pooling",
    "component",
    "blocks_per_stage",
    "widen",
    "components",
    "chosen",
}


def choose_config(
    file: WeightFile, converted: ConvertedWeights, model: str, settings: Mapping[str, Any]
) -> StrictModel:
    """Build the config of *model* from defaults, the user's *settings* and the values detected in the file.

    *settings* are values by dotted key, such as `pooling.iterations`. Raises `WeightsError` if
    the file belongs to another network, `ConfigError` if a setting contradicts the file or is
    missing.
    """
    # First, the file must be of the network that the user asks for.
    defaults = entry(model).defaults
    requested = make_config(model, _with_values(defaults, settings)).model_dump()
    # The pooling is a table, but some networks have a name instead, or none.
    if isinstance(pooling := requested.get("pooling"), dict):
        requested["pooling.kind"] = pooling.get("kind")
    for key, detected in converted.detected.items():
        if key in IDENTITY and requested.get(key) != detected:
            raise _misfit_error(
                file, converted, model, f"{key} is {requested.get(key)}, not {detected}"
            )

    # Then the settings must contain what cannot be read from the file, and agree with it.
    for key, reason in converted.undetermined.items():
        if key not in settings:
            raise ConfigError(f"{file.path}: {reason}; add --option {key}=..")
    for key, detected in converted.detected.items():
        if key in settings and settings[key] != detected:
            raise ConfigError(
                f"--option {key}={settings[key]}: {file.path} holds "
                f"{detected}; leave the setting out"
            )

    values = {**converted.defaults, **settings, **converted.detected}
    return make_config(model, _with_values(defaults, values))


def _with_values(base: Mapping[str, Any], values: Mapping[str, Any]) -> FieldValues:
    """Copy *base* with *values* by dotted key; a name in place of a table (`pooling=gap`) is its `kind`."""
    config = copy.deepcopy(dict(base))

    for key, value in values.items():
        *tables, last = key.split(".")
        table = config
        for name in tables:  # go to the table that holds the value
            if not isinstance(table.setdefault(name, {}), dict):
                table[name] = {"kind": table[name]}
            table = table[name]

        table[last] = value
    return config


def fit_tensors(
    file: WeightFile, converted: ConvertedWeights, model: str, config: StrictModel
) -> dict[str, Tensor]:
    """Build the state dict of *model*; a missing counter of a batch norm is 0.

    Raises `WeightsError` naming the first tensor that is unused, missing, not finite or of
    another shape.
    """
    with torch.device("meta"):
        network = create_model(model, num_classes=converted.num_classes, **config.model_dump())

    # Of these tensors only names, shapes, types and device are used; their values are not
    # initialized.
    expected = network.to_empty(device="cpu").state_dict()
    state = {
        name: torch.zeros_like(tensor)
        for name, tensor in expected.items()
        if name.endswith(COUNTER)
    }

    for name, tensor in converted.tensors.items():
        is_count = name.endswith(COUNTER) and tensor.numel() == 1
        # Some files have counters of shape (1,); the network's have shape ().
        state[name] = tensor.reshape(()) if is_count else tensor
        if name in expected and expected[name].shape == state[name].shape:
            state[name] = state[name].detach().to(expected[name].dtype).contiguous().clone()

    # `state` still contains the tensors that do not fit, so that `first_difference` can name
    # them.
    if problem := first_difference(expected, state):
        raise _misfit_error(file, converted, model, problem)
    return {name: state[name] for name in expected}


def _misfit_error(
    file: WeightFile, converted: ConvertedWeights, model: str, difference: str
) -> WeightsError:
    """Build the error of a file that does not fit *model*; it names the network that the file is of."""
    if converted.model == model:
        return WeightsError(f"{file.path}: does not fit {model} ({difference})")

    advice = "which the catalog does not have"
    if converted.model:
        advice = f"import it --as {converted.model}"
    return WeightsError(
        f"{file.path}: does not fit {model} ({difference}); it looks like "
        f"{converted.description}, {advice}"
    )


def make_row_wise(
    tensors: Mapping[str, Tensor], triangles: Mapping[str, int]
) -> dict[str, Tensor]:
    """Reorder triangles in *tensors* from column by column to row by row.

    *triangles* has the number of rows of their matrices, by the name of the tensor. A tensor of
    another length stays as it is: `fit_tensors` refuses it.
    """
    row_wise = dict(tensors)
    for name, channels in triangles.items():
        rows, columns = torch.triu_indices(channels, channels)  # row by row

        # Column c follows 1 + 2 + ... + c elements: for 3 channels, the order is 0, 1, 3, 2, 4,
        # 5.
        order = columns * (columns + 1) // 2 + rows
        if tensors[name].shape[-1] == len(order):
            row_wise[name] = tensors[name].index_select(-1, order)

    return row_wise
