"""Photographs that a server keeps because a label for them would help.

In a folder of kept photographs, `ID.jpg` or `ID.png` is a photograph without metadata except
its orientation, and `ID.json` its `KeptRecord`. The record is written first, so a record without
a photograph is not complete. Subfolders to which other servers write, each with its lock, are
read, too.

`label` moves photographs. Those outside of the uniform sample are atypical: they were kept because
the network was not sure of them. Figures about new photographs must not count them, so what has a
label is called `ID-sample` if it is of the sample, and `ID` otherwise.
"""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import pydantic

from sopdeploy.config import (
    OtherVersionError,
    StrictModel,
    Text,
    matching,
    parse_json,
    validate_format,
)
from sopdeploy.files import LOCK, MAX_TEXT_BYTES, read_file
from sopdeploy.names import DISTINCT_NAMES
from sopdeploy.photos.files import KEPT_NAME

Reason = Literal["unknown", "low_margin", "sample", "reported"]
MAX_KEPT_LABELS = 100  # classes of a record
LABELLED = ".labelled"  # suffix of the record of a photograph that has a label

log = logging.getLogger("sopdeploy_service.labelling.kept")


class KeptRecord(StrictModel):
    """What was predicted for a kept photograph, and why it was kept.

    Attributes:
        version: Of the format; a record of another one is skipped, and its photograph stays.
        written_by: Version of sopdeploy that wrote the record; None before 0.1.0.
        image: Name of the file beside the record.
        bundle: ID of the bundle that predicted.
        model: Name under which the bundle was served.
        time: When it was predicted, in UTC.
        reasons: Why it was kept: `known` was false, the two most probable classes were close, a hash of
            its bytes put it into the uniform sample, or a person reported that the answer was wrong.
        labels: One or more: all classes in the bundle's order, or the `MAX_KEPT_LABELS` most probable ones,
            best first.
        logits: The logits of `labels`, calibrated: their softmax gives the probabilities.
        known: Whether it probably shows one of the classes; None if the bundle has no threshold for this.
        score: What the threshold of `known` was applied to.
        near_hash: `near_hash` of the network's input.
        suggested: The class that the person suggested, which is no label; None without one.
    """

    version: Literal[1] = 1
    written_by: Text | None = None
    image: Annotated[str, matching(KEPT_NAME.pattern, "name of a kept photo")]
    bundle: Text
    model: Text
    time: pydantic.AwareDatetime
    reasons: Annotated[tuple[Reason, ...], pydantic.Field(min_length=1, max_length=4)]
    labels: Annotated[
        tuple[str, ...],
        pydantic.Field(min_length=1, max_length=MAX_KEPT_LABELS),
        DISTINCT_NAMES,
    ]
    logits: Annotated[tuple[float, ...], pydantic.Field(max_length=MAX_KEPT_LABELS)]
    known: bool | None = None
    score: float | None = None
    near_hash: Annotated[str, matching(r"[0-9a-f]{16}", "hash of 16 hexadecimal digits")]
    suggested: Annotated[str | None, pydantic.Field(exclude_if=lambda name: name is None)] = (
        None
    )

    @pydantic.model_validator(mode="after")
    def _check_lengths(self) -> "KeptRecord":
        if len(self.labels) != len(self.logits):
            raise ValueError(f"{len(self.logits)} logits for {len(self.labels)} labels")
        return self


class Kept(NamedTuple):
    """A kept photograph: the path of the image, and its record."""

    path: Path
    record: KeptRecord


def read_record(path: Path) -> KeptRecord:
    """Read the record at *path*; fields of a later version are ignored.

    Raises `OSError` and, for a damaged record or a later format, `ValueError`.
    """
    fields = parse_json(read_file(path, MAX_TEXT_BYTES))
    return validate_format(KeptRecord, fields, ignore_unknown=True)


def read_labelled(folder: Path) -> list[KeptRecord]:
    """Read the records in *folder* and its subfolders of photographs that have a label, without damaged ones."""
    records = []
    for path in sorted(folder.rglob(f"*{LABELLED}")):
        with suppress(OSError, ValueError):
            records.append(read_record(path))
    return records


def read_kept(folder: Path) -> list[Kept]:
    """Read the kept photographs in *folder* and in its subfolders that a server has locked, the oldest first.

    Records that are damaged, copied or of a later version, or whose photograph is missing or a
    link, are skipped; warnings tell how many, and which version reads them. Raises `OSError` if
    *folder* cannot be read.
    """
    # A folder to which a server writes has its lock. `Path.is_file` would raise an error for a
    # subfolder that cannot be read, such as `lost+found`.
    subfolders = [path for path in sorted(folder.iterdir()) if os.path.isfile(path / LOCK)]  # noqa: PTH113
    record_paths = [
        path for parent in (folder, *subfolders) for path in sorted(parent.glob("*.json"))
    ]

    # Read the records whose photograph is here.
    photographs: list[Kept] = []
    other_versions: list[str] = []
    for path in record_paths:
        try:
            record = read_record(path)
            image = path.with_name(record.image)
            # A copy of a record would repeat its photograph, and a link may lead to any file.
            if image.stem == path.stem and image.is_file() and not image.is_symlink():
                photographs.append(Kept(image, record))
        except OtherVersionError as error:
            other_versions.append(f"{path.name}: {error}")
        except (OSError, ValueError):
            continue  # it is damaged

    # Log what was skipped.
    num_unusable = len(record_paths) - len(photographs) - len(other_versions)
    if num_unusable:
        log.warning(
            "%s: %d records are damaged or have no photo; they are skipped",
            folder,
            num_unusable,
        )
    if other_versions:
        log.warning(
            "%s: %d records are skipped, such as %s",
            folder,
            len(other_versions),
            other_versions[0],
        )

    return sorted(photographs, key=lambda photograph: photograph.record.time)
