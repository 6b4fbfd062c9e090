"""The name of a project, and the origin of a network: its run and its images. Does not import torch."""

import os
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import pydantic

from sopdeploy.config import StrictModel
from sopdeploy.errors import ConfigError
from sopdeploy.files import expand_user

NAME = r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}$"  # names files and folders with up to 50 more characters
TIME = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$"  # UTC; the order of the texts is that of the times
PARTS = {"train", "training"}  # folders with the training images of a data set
SAMPLED = 16  # images of a data set that a bundle records
Time = Annotated[str, pydantic.Field(pattern=TIME)]


def check_name(name: str | None) -> str | None:
    """Return *name*; raise `ConfigError` unless it can name a project."""
    if name is not None and re.fullmatch(NAME, name) is None:
        raise ConfigError(
            "use at most 200 letters, digits, `.`, `_` and `-`, the first not `.`", setting="name", value=name
        )
    return name


Name = Annotated[str | None, pydantic.AfterValidator(check_name)]


def folder_name(folder: str | Path) -> str:
    """Return the name of *folder*, also for `.` and `..`; bytes that are not UTF-8 become `?`."""
    path = os.path.abspath(expand_user(folder))  # noqa: PTH100 - a link keeps its name
    return os.path.basename(path).encode("utf-8", "replace").decode()  # noqa: PTH119


def folder_project(folder: Path) -> str:
    """Name the project of the data in *folder*: that of the folder, or of its parent for `train`.

    Other characters than those of a name are replaced by `-`; the name is empty if nothing remains.
    """
    name = folder_name(folder)
    if name.lower() in PARTS:
        name = folder_name(folder / "..")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:200]


def utc_time(seconds: float) -> str:
    """Write *seconds* since 1970 as a time in UTC."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S.%fZ}"


def short_time(time: str) -> str:
    """Write a time for people: `2026-11-23 00:41:05`, in UTC."""
    return time[:19].replace("T", " ")


def image_keys(hashes: Iterable[int]) -> tuple[str, ...]:
    """Write the 64-bit *hashes* of image files as hexadecimal digits."""
    return tuple(f"{value % 2**64:016x}" for value in hashes)


class RunRecord(StrictModel):
    """The run that trained a network: the name of its folder, a random id, and when it began."""

    name: str
    id: str
    started: Time


class DataRecord(StrictModel):
    """The images of a run, held-out ones included, and their folder; `sample` has hashes of some of them."""

    name: str
    images: int
    classes: int
    sample: tuple[str, ...] = ()


class Origin(StrictModel):
    """Where a trained network comes from."""

    run: RunRecord
    data: DataRecord
