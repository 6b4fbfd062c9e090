"""The data sources that a recipe can name, and the function that opens them."""

import re
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import numpy as np
import pydantic

from sopdeploy.base.config import StrictModel, with_registered
from sopdeploy.base.files import expand_user
from sopdeploy.base.plugins import DATA_SOURCES
from sopdeploy.base.seeds import derive_seed
from sopdeploy.data.folders.folder import open_folder
from sopdeploy.data.folders.libraries import (
    detect_kind,
    has_files_of,
    open_cifar,
    open_digits,
    open_part,
)
from sopdeploy.data.photos.files import Log, list_subfolders
from sopdeploy.data.photos.parts import FORMER_FILES, LABELS_FILE
from sopdeploy.data.photos.photo import LabeledImages, Split, select_classes
from sopdeploy.errors import ConfigError, DataError

SUBSET_SEED = 0  # not the seed of the run: the same number gives the same classes in every run


class DataOptions(StrictModel):
    """Base class of the options of data sources; `classes` is the number of classes to draw.

    They keep their order. GSoP's Tables 3 and 4 draw 250 classes of ImageNet.
    """

    classes: Annotated[int, pydantic.Field(ge=2)] | None = None


class HoldOut(DataOptions):
    """Selection of the held-out images of a source that has none of its own.

    The training loop and `fine_tune` hold out about the fraction `hold_out` of the groups of
    every class, selected by `hold_out_seed`. It is not the seed of the run, so all runs are
    evaluated on the same images.
    """

    hold_out: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.2
    hold_out_seed: int = 0


class DataSource(HoldOut):
    """Base class of the options of a data source that a plug-in adds; the field `kind` is its name.

    Examples:
        >>> from typing import Literal
        >>> class Shards(sopdeploy.DataSource):
        ...     kind: Literal["shards"]
        ...     paths: tuple[str, ...] = ()
        >>> Shards(kind="shards").hold_out
        0.2
    """

    def open(self, log: Log) -> Split:
        """Open the training and held-out images (`Split.undivided` if there are none of these).

        *log* receives warnings. Raises `DataError` if the images cannot be used.
        """
        raise NotImplementedError


class FolderConfig(HoldOut):
    """Location of the images, and of the held-out ones if there is a folder; see `HoldOut`.

    `groups` is a regular expression for names of files without suffix. Images of a folder in
    whose names it finds the same text are never divided: `^clip[0-9]+` keeps `clip1_01.jpg` and
    `clip1_02.jpg` together. It replaces all other groups except groups of copies.

    `classes_from` is `folders` if each folder is a class even if it seems to be none. It can also
    be `subfolders` if the innermost folders are the classes, `paths` if the paths of these are, the path of
    a CSV file, with `:COLUMN` if its heading is unusual, or a regular expression that finds the class in
    the names of files, such as `^\\D+` for `cat.1.jpg`. `leave_out` names folders and files that are not read, also
    with `*`, separated by commas.
    """

    # A folder may be called by a number, which is one in TOML.
    model_config = pydantic.ConfigDict(coerce_numbers_to_str=True)

    kind: Literal["folder"]
    path: Path | None = None
    groups: str = ""
    classes_from: str = ""
    leave_out: str = ""

    @pydantic.field_validator("groups", "classes_from")
    @classmethod
    def _check_pattern(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"not a regular expression ({error}), such as ^clip[0-9]+"
            ) from error
        if pattern == FORMER_FILES:
            raise ValueError(
                "a file beside each image is not read any more; list the classes in labels.csv"
            )
        return pattern


class CifarConfig(DataOptions):
    """`path` is the folder that holds `cifar-10-batches-py` or `cifar-100-python`."""

    kind: Literal["cifar10", "cifar100"]
    path: Path | None = None


class DigitsConfig(DataOptions):
    """The digits of scikit-learn; only the subset of classes can be set."""

    kind: Literal["digits"]


class OfficialConfig(DataOptions):
    """`path` is the `root` of the class in `torchvision.datasets`."""

    kind: Literal["aircraft", "cars", "places365"]
    path: Path | None = None


OwnDataConfig = DigitsConfig | FolderConfig | CifarConfig | OfficialConfig
DataConfig = Annotated[
    OwnDataConfig,
    pydantic.Field(discriminator="kind"),
    with_registered(DATA_SOURCES, DataSource),
    pydantic.SerializeAsAny(),
]


def register_data_source(config: type[DataSource]) -> None:
    """Let recipes name the data source *config*, as `data.kind` with the value of its field `kind`.

    Args:
        config: A subclass of `DataSource`.

    Raises:
        ConfigError: *config* is not such a class, or its name is invalid or in use.

    Examples:
        >>> from typing import Literal
        >>> import numpy as np
        >>> from sopdeploy.data.sources import DataSource
        >>> from sopdeploy.data.photos.photo import ArrayImages, Split
        >>> class Noise(DataSource):
        ...     kind: Literal["noise"]
        ...
        ...     def open(self, log):
        ...         pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32), np.uint8)
        ...         images = ArrayImages(("dark", "bright"), pixels, np.arange(40) % 2)
        ...         return Split.undivided(images)
        >>> sopdeploy.register_data_source(Noise)
        >>> run = sopdeploy.train(recipe="digits-plain", epochs=1, **{"data.kind": "noise"})
        >>> run.train_count, run.held_out_count
        (32, 8)
    """
    DATA_SOURCES.register_config(config, DataSource)


def kind_of_folder(root: Path, kind: str) -> str:
    """Find the `data.kind` that reads the folder *root* in a recipe with the data source *kind*.

    A data set of a library needs its own files in *root*. Without them, images in class folders
    are read as such, whatever the recipe was made for. A data source of a plug-in stays, as does
    *kind* for a folder without classes, because its error names the files that it needs.
    """
    if DATA_SOURCES.find(kind) is not None or has_files_of(kind, root):
        return kind
    return "folder" if kind == "digits" or _holds_classes(root) else kind


def _holds_classes(root: Path) -> bool:
    """Tell whether the folder *root* has subfolders, a file with labels, or an official layout."""
    has_table = (root / LABELS_FILE).is_file()
    return bool(list_subfolders(root)) or has_table or detect_kind(root) is not None


def open_data(config: DataConfig | DataSource) -> Split:
    """Open the training and held-out images of *config*, restricted to its subset of classes if it has one.

    Raises `ConfigError` if no path is set and `DataError` if the data cannot be used.
    """
    # A plug-in's source, then the sources of this package.
    if isinstance(config, DataSource):
        lines: list[str] = []
        split = config.open(lines.append)
        split = replace(split, notes=(*split.notes, *lines))
    elif isinstance(config, DigitsConfig):
        split = open_digits()
    elif config.path is None:
        raise ConfigError(
            "data.path: not set; give the folder of the data", remedies={"data": None}
        )
    elif isinstance(config, FolderConfig):
        opened = open_folder(config.path, config.classes_from, config.leave_out)
        split = _group_by_name(opened, config.groups)
    elif isinstance(config, CifarConfig):
        split = open_cifar(config.kind, expand_user(config.path))
    else:  # an official layout
        root = expand_user(config.path)
        train = open_part(config.kind, "train", root)
        held_out = open_part(config.kind, "held_out", root)
        split = Split(train=train, held_out=held_out)

    return split if config.classes is None else _draw_classes(split, config.classes)


def _group_by_name(split: Split, pattern: str) -> Split:
    """Group the images of each folder in whose names *pattern* finds the same text; "" keeps the groups.

    Raises `DataError` if it finds nothing in the name of any training image.
    """
    if not pattern:
        return split

    names = (
        PurePosixPath(split.train.identity(index)).stem for index in range(len(split.train))
    )
    if not any(re.search(pattern, name) for name in names):
        raise DataError(
            f"data.groups: {pattern!r} finds nothing in any name, such as "
            f"{split.train.identity(0)}; give a regular expression for the part "
            "that files of one object share"
        )

    def group(images: LabeledImages) -> LabeledImages:
        groups = []
        for index in range(len(images)):
            identity = images.identity(index)
            path = PurePosixPath(identity)
            match = re.search(pattern, path.stem)
            groups.append(
                f"group {path.parent} {match.group()}" if match else f"file {identity}"
            )
        return images.replaced(groups=np.asarray(groups, np.str_))

    return replace(split, train=group(split.train), held_out=group(split.held_out))


def _draw_classes(split: Split, count: int) -> Split:
    """Keep *count* randomly drawn classes of *split*, in their order; raises `DataError` if it has fewer."""
    labels = split.train.labels
    if count > len(labels):
        raise DataError(
            f"data.classes: {count}, but the data have {len(labels)} classes; give "
            "a smaller number"
        )

    # In the order of their hashes, so that a larger subset contains the smaller ones.
    shuffled = sorted(
        labels, key=lambda label: (derive_seed(SUBSET_SEED, "classes", label), label)
    )
    drawn = set(shuffled[:count])
    kept = tuple(label for label in labels if label in drawn)

    train, held_out = (select_classes(images, kept) for images in (split.train, split.held_out))
    return replace(split, train=train, held_out=held_out)
