"""`sopdeploy import`: read a published weight file and turn it into a checkpoint.

No code of a file is run: `.pth` files go through the restricted reader of checkpoints,
safetensors files are a JSON header and numbers.
"""

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from shlex import join
from types import MappingProxyType
from typing import Any, Literal

import pydantic
from torch import Tensor

from sopdeploy.base.config import FieldValues, StrictModel, first_problem
from sopdeploy.base.files import sha256
from sopdeploy.base.plugins import IMPORTERS
from sopdeploy.errors import ConfigError, WeightsError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import list_models
from sopdeploy.paths import CHECKPOINT_FORMAT, TORCH_MAGIC
from sopdeploy.version import __version__
from sopdeploy.weights.checkpoint import Checkpoint, parse_checkpoint, write_checkpoint
from sopdeploy.weights.class_names import find_labels, read_class_names
from sopdeploy.weights.conversion import (
    ConvertedWeights,
    Importer,
    WeightFile,
    choose_config,
    fit_tensors,
    make_row_wise,
)
from sopdeploy.weights.files import WeightPath
from sopdeploy.weights.pytorch_projects import (
    convert_cifar_resnet,
    convert_gsop,
    convert_resnet,
    convert_vgg,
)
from sopdeploy.weights.tensor_files import (
    WEIGHTS_ADVICE,
    check_tensors,
    find_tables,
    find_wrappers,
    read_pytorch,
    without_wrappers,
)
from sopdeploy.weights.timm_files import (
    TIMM_PREFIX,
    convert_efficientnet_lite,
    convert_timm,
    find_network,
    refuse_other_network,
)

# The first one that returns weights is used
OWN_IMPORTERS = (
    Importer(marks=("",), convert=convert_timm),  # of all files: the user names the network
    Importer(marks=("conv_stem.",), convert=convert_efficientnet_lite),
    Importer(marks=(".conv_for_DR",), convert=convert_gsop),
    Importer(marks=("layer4.", "features.7."), convert=convert_resnet),
    Importer(marks=("features.0.",), convert=convert_vgg),
    Importer(marks=("linear.",), convert=convert_cifar_resnet),
)

Triangle = Literal["rows", "columns"]
# By the first digits of the SHA-256, which are in the name of the file: what is wrong with a
# published file.
BROKEN = dict.fromkeys(
    ("15991845", "ade9737a"),
    "published before January 2020 with another order of the triangle than the released code has, with "
    "which mpncovresnet50 classifies 0.166 % correctly (fast-MPN-COV, issue 20); import the later file, or "
    "add --set triangle=columns and measure the accuracy",
)
STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict")


class ImportReport(StrictModel):
    """Result of an import; `num_tensors` are in the checkpoint, `labels` is the origin of the class names."""

    looks_like: str
    model: str
    config: FieldValues
    num_classes: int
    labels: str
    preprocess: Preprocess
    num_tensors: int
    notes: tuple[str, ...]
    checkpoint: str


def import_weights(
    source_file: WeightPath,
    model: str,
    destination: Path,
    settings: Mapping[str, Any] = MappingProxyType({}),
    *,
    labels: Path | None = None,
    preprocess: Mapping[str, Any] = MappingProxyType({}),
    triangle: Triangle | None = None,
) -> ImportReport:
    """Write the weight file *source_file* as a checkpoint of catalog *model* to *destination*.

    *settings* are values of the model's config, by dotted key, that the weight file does not
    contain. The file *labels* has the class names. *preprocess* replaces values of the
    preprocessing. *triangle* is the order of the covariance vector in the file, by default that
    of its project. Raises a `SopdeployError`.
    """
    source = source_file.path
    if destination.exists() and source.exists() and destination.samefile(source):
        raise ConfigError(
            f"{destination} is the file to import; give another name", setting="out_file"
        )

    file = open_weights(source_file)
    if isinstance(file, Checkpoint):
        raise WeightsError(
            f"{source}: already a sopdeploy checkpoint; use it without importing it"
        )

    # Of a published file that is known to be wrong, the user must say what is right.
    problem = BROKEN.get(file.sha256[:8])
    if problem is not None and triangle is None:
        raise WeightsError(f"{source}: {problem}")

    # Find what the file is, by the names and shapes of its tensors.
    converted = convert_weights(file, model, triangle)
    if converted.num_classes == 0:
        raise WeightsError(
            f"{source}: has no classifier, so it cannot classify; train one: "
            "sopdeploy train "
            f"{join(['--pretrained', str(source), '--set', f'model.name={model}'])}"
        )

    # The file decides what it can; *settings* and *labels* add the rest.
    config = choose_config(file, converted, model, settings)
    state = fit_tensors(file, converted, model, config)
    names, label_origin = _find_class_names(file, converted, labels)

    # The checkpoint records where its weights come from.
    try:
        checkpoint = Checkpoint(
            model=model,
            config=config.model_dump(mode="json"),
            weights=state,
            labels=names,
            preprocess=Preprocess(**{**converted.preprocess.model_dump(), **preprocess}),
            training={
                "imported_from": source.name,
                "imported_sha256": file.sha256,
                "imported_project": converted.project,
                "versions": {"sopdeploy": __version__},
            },
        )
    except pydantic.ValidationError as error:
        raise ConfigError(first_problem(error)) from error

    write_checkpoint(destination, checkpoint)
    return ImportReport(
        looks_like=converted.description,
        model=model,
        config=checkpoint.config,
        num_classes=converted.num_classes,
        labels=label_origin,
        preprocess=checkpoint.preprocess,
        num_tensors=len(state),
        notes=(*converted.notes, *file.notes),
        checkpoint=str(destination),
    )


def open_weights(file: WeightPath) -> WeightFile | Checkpoint:
    """Read the weight file or the checkpoint *file*, whose format is detected.

    Raises `WeightsError`, and `CheckpointError` for a damaged checkpoint.
    """
    path = file.path
    if not file.first.startswith(TORCH_MAGIC):
        for importer in _registered_importers():
            if importer.magic and importer.read and file.first.startswith(importer.magic):
                return importer.read(path, sha256(path))

    content, digest = read_pytorch(file)
    if isinstance(content, dict) and content.get("format") == CHECKPOINT_FORMAT:
        return parse_checkpoint(path, content, digest)

    # A training checkpoint holds several tables of tensors; the network is the largest.
    tables = find_tables(content, levels=2)
    candidates = [tables[name] for name in ("", *STATE_DICT_KEYS) if name in tables]
    if not candidates:
        problem = "contains no table of tensors, also not under the key `state_dict`"
        raise WeightsError(f"{path}: {problem}; {WEIGHTS_ADVICE}")
    table = max(candidates, key=len)  # beside it, a file can hold single tensors

    stored = {name: value for name, value in table.items() if isinstance(value, Tensor)}
    wrappers = find_wrappers(stored)
    tensors = {without_wrappers(name, wrappers): value for name, value in stored.items()}

    return WeightFile(
        path=path,
        sha256=digest,
        tensors=check_tensors(path, tensors),
        others=tuple(name for name in table if name not in stored),
        arch=content["arch"] if isinstance(content.get("arch"), str) else None,
        labels=find_labels(content),
    )


def convert_weights(
    file: WeightFile, model: str, triangle: Triangle | None = None
) -> ConvertedWeights:
    """Convert *file* for catalog *model*; its covariance vectors become triangles row by row.

    *triangle* is their order in the file, by default that of its project. Raises `ConfigError` for
    a *triangle* if the file has no covariance vectors, and `WeightsError` if no importer
    recognizes the file; this error names the network of timm that fits, if there is one.
    """
    if converted := _convert_by_importer(file, model):
        if triangle is not None and not converted.triangles:
            reason = f"{converted.description} reads no covariance vector; leave it out"
            raise ConfigError(reason, setting="triangle", value=triangle)
        by_columns = converted.by_columns if triangle is None else triangle == "columns"
        if not by_columns:
            return converted
        return replace(converted, tensors=make_row_wise(converted.tensors, converted.triangles))

    refuse_other_network(file, model)
    first_names = ", ".join(list(file.tensors)[:3])
    raise WeightsError(
        f"{file.path}: its tensors ({first_names} ..) are not from a project "
        "that `sopdeploy import --help` lists, nor the tensors of a network of "
        "timm whose name the file has; name its network as timm:NAME, or "
        "export it as your own network with `sopdeploy export "
        "--network`"
    )


def network_of_weights(file: WeightFile, default: str) -> str:
    """Name the network that the weights in *file* fit: *default* unless they are those of another one."""
    converted = _convert_by_importer(file, default)
    network = find_network(file) if converted is None else converted.model
    if network is None or network == default:
        return default

    # An importer may return a name with options, "resnet20 --option depth=32", which names no
    # network.
    is_network = network.startswith(TIMM_PREFIX) or network in list_models()
    return network if is_network else default


def _convert_by_importer(file: WeightFile, model: str) -> ConvertedWeights | None:
    """Convert *file* by the first importer that recognizes it; None if none does."""
    # A file of a subclass was read by a registered importer; sopdeploy's own cannot convert it.
    has_own_format = type(file) is not WeightFile
    for importer in chain(() if has_own_format else OWN_IMPORTERS, _registered_importers()):
        if not any(mark in name for mark in importer.marks for name in file.tensors):
            continue
        try:
            converted = importer.convert(file, model)
        # Tensors with other axes raise these.
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise WeightsError(
                f"{file.path}: differs from the released networks ({reason}); "
                "give a released network"
            ) from error
        if converted is not None:
            return converted

    return None


def _registered_importers() -> Iterator[Importer]:
    """Yield the importers that packages have registered; each is imported when it is reached."""
    for name in IMPORTERS.names():
        if importer := IMPORTERS.find(name):
            yield importer


def _find_class_names(
    weights: WeightFile, converted: ConvertedWeights, file: Path | None
) -> tuple[tuple[str, ...], str]:
    """Return the class names in output order, and where they are from.

    They are those in *file* or, without it, those in the weight file, or those of its training
    data, or numbers. Raises `ConfigError` if a file has names for another number of classes.
    """
    count = converted.num_classes
    names = weights.labels if file is None else read_class_names(file)

    if names is not None:
        origin = f"class_to_idx of {weights.path}" if file is None else str(file)
        if len(names) != count:
            raise ConfigError(
                f"{origin} has {len(names)} names for {count} classes; give one per class",
                setting="labels",
            )
        return names, origin

    if converted.class_names and count == len(converted.class_names):
        return converted.class_names, f"the classes of {converted.project}"
    if converted.imagenet and count == 1000:
        published = importlib.import_module("torchvision.models").ResNet18_Weights.IMAGENET1K_V1
        return tuple(published.meta["categories"]), "ImageNet, as torchvision names them"

    width = len(str(count - 1))
    numbers = tuple(f"class {index:0{width}}" for index in range(count))
    return numbers, "numbers; give --labels for names"
