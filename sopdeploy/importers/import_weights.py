"""A published weight file becomes a checkpoint: open, recognise, translate, fit, write."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

import sopdeploy
from sopdeploy.checkpoint import Checkpoint, write_checkpoint
from sopdeploy.config import StrictModel, first_problem
from sopdeploy.errors import ConfigError, WeightsError
from sopdeploy.files import sha256
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.importers.class_names import class_names
from sopdeploy.importers.fast_mpncov import FastMpnCovResNet, FastMpnCovVgg
from sopdeploy.importers.fit import choose_config, fitted
from sopdeploy.importers.gmsop import GMSOPNetwork
from sopdeploy.importers.gsop import GSoPNet
from sopdeploy.importers.resnets import CifarResNet, TorchvisionResNet
from sopdeploy.importers.source import Source, WeightFile
from sopdeploy.importers.timm_network import TimmNetwork
from sopdeploy.importers.weight_files import open_weights

SOURCES: tuple[Source, ...] = (
    TimmNetwork(),
    GSoPNet(),
    FastMpnCovResNet(),
    FastMpnCovVgg(),
    CifarResNet(),
    GMSOPNetwork(),
    TorchvisionResNet(),
)


def recognise(file: WeightFile, name: str) -> Source:
    """Return the source of *file*; raises `WeightsError` with its first names where nobody knows it."""
    for source in SOURCES:
        if source.recognises(file, name):
            return source
    some = ", ".join(list(file.tensors)[:3])
    known = ", ".join(sorted({source.project for source in SOURCES}))
    raise WeightsError(f"{file.path}: its tensors ({some} ..) are those of none of {known}")


class ImportOptions(StrictModel):
    """What the file cannot say: switches of the network, class names, other sizes of pictures."""

    settings: dict[str, Any] = pydantic.Field(default_factory=dict)
    labels: Path | None = None
    resize: int | None = None
    crop: int | None = None
    interpolation: str | None = None


class Row(StrictModel):
    """One tensor of the checkpoint, the file's tensors it was made of, and how."""

    name: str
    of: tuple[str, ...]
    how: str
    shape: tuple[int, ...]


class ImportReport(StrictModel):
    """What an import did, key by key."""

    file: str
    sha256: str
    project: str
    looks_like: str
    model: str
    config: dict[str, Any]
    num_classes: int
    labels: str
    preprocess: Preprocess
    rows: tuple[Row, ...]
    ignored: dict[str, str]
    beside: tuple[str, ...]
    notes: tuple[str, ...]
    checkpoint: str


def import_weights(source: Path, name: str, destination: Path, options: ImportOptions) -> ImportReport:
    """Write the weights in the file *source* as a checkpoint of catalog model *name* to *destination*.

    Raises a `SopdeployError` where the file cannot be read, is of no known project or is another network.
    """
    if destination.exists() and source.exists() and destination.samefile(source):
        raise ConfigError(f"--out {destination}: is the file to import; name another one")
    file = open_weights(source)
    project = recognise(file, name)
    found = project.translate(file, name)
    config = choose_config(file, found, name, options.settings)
    state, rows = fitted(file, found, name, config)
    labels, where = class_names(found, options.labels)
    rules = resized(found.preprocess, options)
    digest = sha256(source)
    checkpoint = Checkpoint(
        model=name,
        config=config.model_dump(mode="json"),
        weights=state,
        labels=labels,
        preprocess=rules,
        training={
            "imported_from": source.name,
            "imported_sha256": digest,
            "imported_project": project.project,
            "versions": {"sopdeploy": sopdeploy.__version__},
        },
    )
    write_checkpoint(destination, checkpoint)
    return ImportReport(
        file=str(source),
        sha256=digest,
        project=project.project,
        looks_like=found.looks_like,
        model=name,
        config=checkpoint.config,
        num_classes=found.num_classes,
        labels=where,
        preprocess=rules,
        rows=tuple(
            Row(name=one.ours, of=one.theirs, how=one.how, shape=tuple(one.tensor.shape)) for one in rows
        ),
        ignored=dict(found.ignored),
        beside=file.beside,
        notes=found.notes,
        checkpoint=str(destination),
    )


def resized(rules: Preprocess, options: ImportOptions) -> Preprocess:
    """Return *rules* with the sizes the user asked for; raises `ConfigError`."""
    wishes = options.model_dump(include={"resize", "crop", "interpolation"}, exclude_none=True)
    try:
        return Preprocess(**{**rules.model_dump(), **wishes})
    except pydantic.ValidationError as problem:
        raise ConfigError(f"--resize, --crop, --interpolation: {first_problem(problem)}") from problem


def nest_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted *settings* as tables: `pooling.iterations` becomes a key of `pooling`."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *tables, last = key.split(".")
        here = tree
        for table in tables:
            below = here.setdefault(table, {})
            if not isinstance(below, dict):
                raise ConfigError(f"--set {key}: {table} is a value, not a table with keys")
            here = below
        here[last] = value
    return tree
