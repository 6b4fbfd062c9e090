"""`sopdeploy forget`: delete a photograph, its label and its records for a person who asks for it."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sopdeploy.cli.command import command
from sopdeploy.cli.console import print_field, say
from sopdeploy.errors import DataError
from sopdeploy.files import atomic_write, sha256, writing
from sopdeploy.images.limits import SUFFIXES

ID = re.compile(r"[0-9a-f]{32}")  # of a kept photograph: the first digits of the sha256 of the sent file
RECORDS = (".json", ".skipped")  # beside a kept photograph
# Values of columns that cannot be empty.
FORGOTTEN = {"path": "forgotten", "location": "forgotten", "offset": 0, "size": 0}


def _show(deleted: Sequence[Path]) -> None:
    for path in deleted:
        print_field("deleted", str(path), style="")
    say('what may remain: docs/operations.md, "Erasure"')


@command(_show, summarize=lambda deleted: {"deleted": list(map(str, deleted))})
def forget(photograph: str, folders: list[Path]) -> list[Path]:
    """Delete a photograph, its label and its records in folders, also in the rows of `classify`.

    Every copy goes that has the content of the file, its name if it was kept, or the given name.

    Example: sopdeploy forget photo.jpg kept photos photos-held-out photos-unknown

    Args:
        photograph: The file that was sent, or the name of a kept or labelled photograph.
        folders: Folders of kept and labelled photographs, and output folders of `classify`.

    Returns:
        The files that were deleted or changed.

    Raises:
        DataError: A folder is missing, or none contains the photograph, or a table is of a later version.
    """
    named = [Path(folder) for folder in folders]
    for folder in named:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; name folders of photographs or of `classify`")
    is_wanted, changed = _matcher(photograph), list[Path]()
    files = [path for folder in named for path in sorted(folder.rglob("*"))]
    tables = [path for path in files if path.suffix == ".parquet" and path.is_file()]
    for table in tables:  # before any is changed
        _check_table(table)
    for table in tables:  # before the images, whose content the rows are compared by
        with writing(table):
            changed += [table] if _forget_rows(table, Path(photograph).name, is_wanted) else []
    for image in files:
        if image.suffix.lower() in SUFFIXES and image.is_file() and is_wanted(image):
            with writing(image):
                changed += _delete(image)
    if not changed:
        raise DataError(f"{photograph}: not found in {', '.join(map(str, named))}; check the name")
    return changed


def _matcher(photograph: str) -> Callable[[Path], bool]:
    """Return a test whether a path is *photograph*, by its name, its id or, of a file, its content."""
    path = Path(photograph)
    digest = sha256(path) if path.is_file() else ""
    stem = digest[:32] or (path.stem if ID.fullmatch(path.stem) else "")

    def is_wanted(other: Path) -> bool:
        if other.stem == stem:
            return True
        if not digest:
            return other.name == path.name
        same_size = other.is_file() and other.stat().st_size == path.stat().st_size
        return same_size and sha256(other) == digest

    return is_wanted


def _delete(image: Path) -> list[Path]:
    """Delete *image* and its records; return what was there."""
    files = [image, *(image.with_suffix(suffix) for suffix in RECORDS if ID.fullmatch(image.stem))]
    found = [file for file in files if file.exists() or file.is_symlink()]
    for file in reversed(found):  # the record first
        file.unlink()
    return found


def _check_table(table: Path) -> None:
    """Raise `DataError` if *table* is of a later format than this version can rewrite."""
    import pyarrow.parquet as pq  # of an extra

    from sopdeploy_commands.tables import check_schema

    try:
        check_schema(pq.read_schema(table))
    except ValueError as error:  # also of pyarrow, for a damaged file
        raise DataError(f"{table}: {error}") from error


def _forget_rows(table: Path, name: str, is_wanted: Callable[[Path], bool]) -> bool:
    """Replace the rows of a photograph in a table of `classify` by empty ones; return whether there are any.

    The table keeps its number of rows, so that a run can continue.
    """
    import pyarrow as pa  # of an extra
    import pyarrow.parquet as pq

    def is_row(path: str) -> bool:
        return Path(path).name == name or is_wanted(Path(path))

    with pq.ParquetFile(table) as file:
        schema = file.schema_arrow
        if "path" not in schema.names:
            return False
        groups = [file.read_row_group(number) for number in range(file.num_row_groups)]
    wanted = [[is_row(path) for path in group["path"].to_pylist()] for group in groups]
    if not any(map(any, wanted)):
        return False
    with atomic_write(table) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for group, marks in zip(groups, wanted, strict=True):
            columns = [_blank(group[field.name], field, marks, pa) for field in schema]
            writer.write_table(pa.table(columns, schema=schema))
    return True


def _blank(column: Any, field: Any, marks: Sequence[bool], pa: Any) -> Any:
    """Copy *column* without the values of the marked rows."""
    empty = FORGOTTEN.get(field.name)
    values = [empty if mark else value for value, mark in zip(column.to_pylist(), marks, strict=True)]
    return pa.array(values, field.type)
