"""The name of a project, and the origin of a network: its run and its images. Does not import torch."""

import os
import re
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Self

import pydantic

from sopdeploy.base.config import StrictModel, Text, matching
from sopdeploy.base.files import expand_user
from sopdeploy.base.names import as_utf8, is_bundle_name, project_problem, without_bundle_end
from sopdeploy.errors import ConfigError

# UTC; the order of the texts is that of the times.
Time = Annotated[
    str,
    matching(
        r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z", "a time in UTC"
    ),
]
RUNS = Path("runs")  # where `train` writes by default
MAX_RECORDED = 2000  # images of a data set that a bundle records, 50 KB


def check_project_name(name: str | None) -> str | None:
    """Return *name*; raise `ConfigError` unless it can name a new project, which no bundle is named like."""
    problem = None if name is None else project_problem(name)
    if name is not None and is_bundle_name(name):
        problem = "the name of a bundle ends with `-` and 12 hexadecimal digits; leave them out"
    if problem:
        raise ConfigError(problem, setting="name", value=name)
    return name


Name = Annotated[str | None, pydantic.AfterValidator(check_project_name)]


class FolderReading(StrictModel):
    """How the images of a folder were read, also if nobody said so.

    `folder` below it is the data set, "" if it is that itself. `classes_from` and `leave_out` are
    the settings of a recipe's data that read it so. Neither `folder` nor a table leads out of the
    folder: a bundle of somebody else reads nothing beside the images that it is evaluated on.
    """

    folder: Text = ""
    classes_from: Text = ""
    leave_out: Text = ""

    @pydantic.model_validator(mode="after")
    def _check_stays_inside(self) -> Self:
        for path in (self.folder, table_folder(self.classes_from)):
            if leads_out(path):
                raise ValueError(f"{path!r} leads out of the folder of the images")
        return self


def table_folder(classes_from: str) -> str:
    """Return the folder of the table that *classes_from* may name, as `named_table` finds it."""
    return str(PurePosixPath(classes_from.partition(":")[0]).parent)


def leads_out(path: str) -> bool:
    """Tell whether *path*, which begins in a folder, may lead out of it."""
    return PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts


AS_IT_IS = FolderReading()  # class folders, or parts of a data set, without a choice


class Origin(StrictModel):
    """Where a trained network comes from.

    `run` and `data` are the names of the folders of the run and of its images. `num_images`
    includes the held-out ones; `sample` has the lowest hashes of training images, at most
    `MAX_RECORDED`. `formats` are those of the images, names of `FORMATS`; none are known of images
    that are not files, and of networks that 0.1.0 trained. `reading` is known since 0.3.0.
    `out_of_fold` is what cross-validation answered for the training photos of a server's random sample: the
    hash of a photo and the index of a class, -1 if no classifier without the photo knew its class.
    """

    run: Text
    run_id: Text
    started: Time
    data: Text
    num_images: int
    num_classes: int
    sample: Annotated[tuple[int, ...], pydantic.Field(max_length=MAX_RECORDED)] = ()
    formats: Annotated[tuple[Text, ...], pydantic.Field(max_length=MAX_RECORDED)] = ()
    reading: FolderReading = AS_IT_IS
    out_of_fold: Annotated[
        tuple[tuple[int, int], ...], pydantic.Field(max_length=MAX_RECORDED)
    ] = ()

    def written_fields(self) -> dict[str, Any]:
        """Return the fields for a file: those that earlier versions do not know only if they have content."""
        fields = self.model_dump(mode="json")
        if self.reading == AS_IT_IS:
            del fields["reading"]
        if not self.out_of_fold:
            del fields["out_of_fold"]
        return fields


def folder_name(folder: str | Path) -> str:
    """Return the name of *folder*, also for `.` and `..`; bytes that are not UTF-8 become `?`."""
    path = os.path.abspath(expand_user(folder))  # noqa: PTH100 - a link keeps its name
    return as_utf8(os.path.basename(path))  # noqa: PTH119


def folder_project(folder: Path) -> str:
    """Name the project of the data by their *folder*; by its parent if it is a file or named `train`.

    `-` replaces characters that names of projects do not have, and `without_bundle_end` changes a
    name that ends like that of a bundle. The name may be empty.
    """
    path = expand_user(folder).absolute()
    named = path.parent if path.is_file() else path
    name = folder_name(named)

    if name.lower() in {"train", "training"}:
        # Not `named.parent`, which would be wrong if *folder* ends with `..`.
        name = folder_name(named / "..")
    return _as_project(name)


def file_project(file: Path) -> str:
    """Name the project of the weights in *file* by the file, or `network` if no character is left."""
    return _as_project(as_utf8(file.stem.removesuffix(".pth"))) or "network"


def _as_project(name: str) -> str:
    return without_bundle_end(re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:200])


def utc_now() -> str:
    """Return SOURCE_DATE_EPOCH, or now if it is not set, as `Time`; raises `ConfigError` if it is invalid."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        time = datetime.now(UTC) if epoch is None else datetime.fromtimestamp(int(epoch), UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise ConfigError(
            f"SOURCE_DATE_EPOCH={epoch}: not a number of seconds since 1970; "
            "correct or unset it"
        ) from error
    return f"{time:%Y-%m-%dT%H:%M:%S.%fZ}"
