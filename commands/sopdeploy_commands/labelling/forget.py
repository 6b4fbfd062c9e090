"""`sopdeploy forget`: delete a photograph, its label and its records for a person who asks for it."""

import mmap
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from sopdeploy.bundle.folder import read_manifest
from sopdeploy.cli.command import command
from sopdeploy.cli.console import print_field, say
from sopdeploy.errors import BundleError, DataError, shorten
from sopdeploy.file_systems import lock_file
from sopdeploy.files import (
    LOCK,
    MAX_IMAGE_BYTES,
    PARTIAL,
    atomic_write,
    features_folder,
    read_file,
    remove_leftovers,
    writing,
)
from sopdeploy.images.signatures import is_image
from sopdeploy.photos.files import ID_DIGITS, id_of_file, kept_id, normalize, walk
from sopdeploy.photos.photo import Photo
from sopdeploy.project import BUNDLES, RUNS
from sopdeploy_commands.tables import ROWS_FOLDER, STATE, VERSION_KEY, check_schema
from sopdeploy_service.inference.drift import BLOCK_SUFFIX, DAMAGED, read_block
from sopdeploy_service.inference.drift_state import TRAFFIC

RECORDS = ".json", ".skipped", ".labelled"  # beside a kept photograph
# What a temporary file has after the name of the other file; a file called `.partial` names no
# other one.
_PARTIAL_NAME = re.compile(rf"(?<=.)(\.[0-9a-f]{{8}})?{re.escape(PARTIAL)}")
# Values of a forgotten row in columns that cannot be empty
FORGOTTEN = {"path": "forgotten", "location": "forgotten", "offset": 0, "size": 0}


class Remainder(NamedTuple):
    """What may still hold the photograph, why, and the shell command that removes it."""

    path: Path
    reason: str
    command: str


class Forgotten(NamedTuple):
    """The files that were `deleted` or changed, and what `remains` elsewhere."""

    deleted: list[Path]
    remains: list[Remainder]


def _show(forgotten: Forgotten) -> None:
    for path in forgotten.deleted:
        print_field("deleted", str(path), style="")
    for remainder in forgotten.remains:
        say(f"remains: {remainder.path}, {remainder.reason}; remove it: {remainder.command}")
    say('what may remain elsewhere: docs/keep.md, "Erasure"')


def _summarize(forgotten: Forgotten) -> dict[str, object]:
    return {
        "deleted": [str(path) for path in forgotten.deleted],
        "remains": [
            {"path": str(path), "reason": reason, "command": command_line}
            for path, reason, command_line in forgotten.remains
        ],
    }


@command(
    _show,
    summarize=_summarize,
    examples=("sopdeploy forget photo.jpg kept photos photos-held-out photos-unknown",),
)
def forget(photograph: str, folders: list[Path]) -> Forgotten:
    """Delete a photo, its label, its records, and its rows in the output of `classify`.

    The command deletes every file that has the same content or the given name. It finds rows of
    `classify` by the hash of the file, so the file may have been renamed or in an archive. It finds
    rows without a hash by the names of the photo and of its copies. If the command was stopped, run
    it again. It does not delete runs and bundles that contain the photo, and the cache of features,
    but lists them with the commands that do.

    Args:
        photograph: The file that was sent, or the name of a kept or labelled photo.
        folders: Folders of kept and labelled photos, and output folders of `classify`.

    Returns:
        The files that were deleted or changed, and what remains.

    Raises:
        DataError: A folder is missing, or none contains the photo, several have this name, or
            a table is of a later version or is being written.
        StorageError: A file cannot be changed.
    """
    searched = [Path(folder) for folder in folders]  # the command line gives text

    wanted = _Wanted.read(photograph)
    names = {Path(photograph).name, *wanted.ids}
    hashes = set[int]()  # of the files, as bundles record them

    # Searches again until nothing is left: `label` may have moved the photograph in the
    # meantime.
    deleted: list[Path] = []
    while (traces := _find_traces(photograph, wanted, searched)).rows or traces.files:
        for path in filter(is_image, traces.files):
            names.add(kept_id(path.name) or path.name)
            hashes.add(Photo(path.name, read_file(path, MAX_IMAGE_BYTES)).file_hash)
        deleted += _delete(traces)

    remains = list(_find_remainders(names, hashes))
    if not deleted:
        where = ", ".join(map(str, searched))
        text = f"{photograph}: nothing of it is in {where}; it was deleted already, or has another name"
        if remains:
            listed = shorten([f"{one.path} ({one.command})" for one in remains])
            text += f"; it may remain in {listed}"
        raise DataError(text)
    return Forgotten(deleted, remains)


def _holds_any(path: Path, texts: list[bytes]) -> bool:
    """Tell whether the file at *path*, which must not be empty, contains one of *texts*.

    It is mapped instead of read, because it may be as large as a checkpoint.
    """
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return any(content.find(text) >= 0 for text in texts)


def _find_remainders(names: set[str], hashes: set[int]) -> Iterator[Remainder]:
    """Find runs whose files name the photograph, bundles that were trained on it, and the cache."""
    texts = [name.encode() for name in sorted(names)]
    for run in _subfolders(RUNS):
        holding = [
            path.name
            for path in sorted(run.rglob("*"))
            if path.is_file() and path.stat().st_size and _holds_any(path, texts)
        ]
        if holding:
            reason = f"named in {shorten(holding)}"
            yield Remainder(run, reason, shlex.join(["rm", "-r", str(run)]))

    # A bundle that was trained on many images has the hashes of some only, so it may be missed.
    for bundle in _subfolders(BUNDLES):
        with suppress(BundleError):
            origin = read_manifest(bundle).origin
            if origin is not None and hashes.intersection(origin.sample):
                reason = "trained on it, with its hash in the manifest"
                yield Remainder(bundle, reason, shlex.join(["rm", "-r", str(bundle)]))

    cache = features_folder()
    if cache.is_dir() and any(cache.iterdir()):
        reason = "perhaps with its features and a gray thumbnail"
        yield Remainder(cache, reason, shlex.join(["rm", "-r", str(cache)]))


def _subfolders(parent: Path) -> list[Path]:
    """List the folders in *parent*, which may not exist, without links."""
    children = sorted(parent.iterdir()) if parent.is_dir() else []
    return [path for path in children if path.is_dir() and not path.is_symlink()]


def _delete(traces: "_Traces") -> list[Path]:
    """Delete the files of *traces* and empty its rows; return what was changed.

    Raises `StorageError` when a file cannot be changed, and `DataError` if a run of `classify`
    writes to one of the tables' folders.
    """
    rows = traces.rows
    # First the rows, under the lock of their run.
    with ExitStack() as locks:
        for folder in {_output_folder(table) for table in rows}:
            _lock_output(folder, locks)
        for table, numbers in rows.items():
            with writing(table):
                _empty_rows(table, numbers)

    # Then the files, and what interrupted writes have left in the searched folders.
    for path in traces.files:
        with writing(path):
            path.unlink(missing_ok=True)
    for folder in {path.parent for path in traces.unfinished}:
        remove_leftovers(folder)

    return [*rows, *traces.files]


class _Traces(NamedTuple):
    """What remains of a photograph: files, in the order to delete them, and numbers of rows by table.

    `unfinished` are all temporary files of the searched folders, whatever they were to become.
    """

    files: list[Path]
    rows: dict[Path, list[int]]
    unfinished: list[Path]


def _find_traces(photograph: str, wanted: "_Wanted", folders: Sequence[Path]) -> _Traces:
    """Find what remains of *photograph* in *folders*; raise `DataError` as `forget` does."""
    for folder in folders:
        if not folder.is_dir():
            raise DataError(
                f"{folder}: no such folder; name folders of photos or of `classify`"
            )

    # All files, each once: folders may contain one another.
    paths = chain.from_iterable(walk(folder, hidden=True) for folder in folders)
    by_absolute_path = {os.path.abspath(path): path for path in paths}  # noqa: PTH100
    files = list(by_absolute_path.values())
    tables = [path for path in files if path.suffix == ".parquet" and path.is_file()]
    for table in tables:
        _check_format(table)

    # The photograph. A kept photograph has its id as its name, and so has the record beside it.
    images = [path for path in files if wanted.is_shown_by(path)]
    ids_of_images = {kept_id(_final_path(image).name) for image in images}
    ids = wanted.ids.union(ids_of_images - {""})

    traces = {*images, *_find_by_ids(files, ids)}

    # Rows of tables, which have its hash or, without one, the end of the path of a copy.
    copies = [path for path in (wanted.path, *images) if wanted.is_file]
    named = wanted._replace(ids=ids, copies=frozenset(map(os.path.realpath, copies)))
    rows_by_table = _find_rows(named, tables)
    rows = {table: [*found] for table, found in rows_by_table.items() if found}

    # A given name must belong to one photograph only; an id always does.
    if not wanted.is_file and not ids:
        contents = {id_of_file(path): str(path) for path in images}
        unread = set[str]()  # paths of rows without a hash
        for row in chain.from_iterable(found.values() for found in rows_by_table.values()):
            if row.file_id:
                contents.setdefault(row.file_id, row.path)
            else:
                unread.add(row.path)

        if len(contents) > 1 or len(unread) > 1:
            names = shorten(sorted({*contents.values(), *unread}))
            raise DataError(
                f"{photograph}: is the name of different photos ({names}); name one with its folder"
            )

    # The records first and the named file last: until then, a repeated command finds all that
    # is left.
    ordered = sorted(traces, key=lambda path: (wanted.is_named(path), path in images, path))
    unfinished = [path for path in files if path.name.endswith(PARTIAL)]
    return _Traces(ordered, rows, unfinished)


def _find_by_ids(files: Sequence[Path], ids: frozenset[str]) -> Iterator[Path]:
    """Find the records and images of *files* with one of *ids*, and the blocks of traffic that hold one.

    A block of traffic has the network's inputs of consecutive answers.
    """
    for path in files:
        final_path = _final_path(path)
        if kept_id(final_path.name) in ids and (
            final_path.suffix.lower() in RECORDS or is_image(final_path)
        ):
            yield path

        if path.parent.parent.name == TRAFFIC and path.suffix == BLOCK_SUFFIX:
            with suppress(*DAMAGED):
                if ids.intersection(read_block(path).identities.tolist()):
                    yield path


class _Wanted(NamedTuple):
    """A photograph to forget: the given path; size and ID if it is a file; ids under which it is kept.

    `copies` are the paths of files with its content.
    """

    path: Path
    size: int
    file_id: str
    ids: frozenset[str]
    copies: frozenset[str] = frozenset()

    @property
    def is_file(self) -> bool:
        """Whether a file was given, which is then found by its content; otherwise a name was."""
        return self.file_id != ""

    @classmethod
    def read(cls, photograph: str) -> "_Wanted":
        """Read the file *photograph*, if there is one; otherwise it is a name."""
        path = Path(photograph)
        file_id = id_of_file(path) if path.is_file() else ""
        ids = {file_id, kept_id(path.name)} - {""}
        return cls(path, path.stat().st_size if file_id else 0, file_id, frozenset(ids))

    def is_shown_by(self, path: Path) -> bool:
        """Tell whether *path* has the content of the given file, or is an image with the given name."""
        if self.is_file:
            return self.has_content(path)
        final_path = _final_path(path)
        return self.is_named(final_path) and is_image(final_path)

    def is_named(self, path: Path) -> bool:
        """Tell whether *path* leads to the given file, or ends with the given name if there is no file."""
        if self.is_file:
            return os.path.realpath(path) == os.path.realpath(self.path)
        return _ends_with(path, self.path)

    def has_content(self, path: Path) -> bool:
        """Tell whether the file *path* has the content of the given file."""
        with suppress(OSError):  # it does not exist
            return (
                path.is_file()
                and path.stat().st_size == self.size
                and id_of_file(path) == self.file_id
            )
        return False

    def has_row(self, row: "_Row") -> bool:
        """Tell whether *row* is about the photograph: by an id, the given name or, without an id, a copy's path."""
        if not self.ids.isdisjoint((row.file_id, kept_id(row.path))):
            return True
        if not self.is_file:
            return _ends_with(Path(row.path), self.path)
        return not row.file_id and any(
            _ends_with(Path(copy), Path(row.path)) for copy in self.copies
        )


def _ends_with(path: Path, end: Path) -> bool:
    """Tell whether *path* ends with the parts of *end*, however their characters are encoded."""
    parts = [normalize(part) for part in end.parts]
    return [normalize(part) for part in path.parts][-len(parts) :] == parts


def _final_path(path: Path) -> Path:
    """Return *path*; for a temporary file, the path of the file that it would have become."""
    return (
        path.with_name(_PARTIAL_NAME.sub("", path.name))
        if path.name.endswith(PARTIAL)
        else path
    )


class _Row(NamedTuple):
    """A row of `classify`: the path of the image, and the id of its file, empty if it was not read."""

    path: str
    file_id: str


def _find_rows(wanted: _Wanted, tables: Sequence[Path]) -> dict[Path, dict[int, _Row]]:
    """Find the rows of *wanted* in *tables* by their numbers; tables of other programs are left out.

    The list of a run has no hashes, so it takes them from the rows with equal paths. It comes first, so
    that a repeated command still finds them.
    """
    import pyarrow.parquet as pq  # of an extra

    lists = dict[Path, list[str | None]]()
    hashed = dict[Path, list[str | None]]()
    ids = dict[tuple[Path, str | None], str]()  # by output folder and path
    for table in tables:
        schema = pq.read_schema(table)
        if VERSION_KEY not in (schema.metadata or {}) or "path" not in schema.names:
            continue

        columns = pq.read_table(table, columns=[*{"path", "sha256"}.intersection(schema.names)])
        paths = columns["path"].to_pylist()
        if "sha256" not in schema.names:
            lists[table] = paths
            continue

        hashed[table] = paths
        for path, sha256 in zip(paths, columns["sha256"].to_pylist(), strict=True):
            if sha256:
                ids[_output_folder(table), path] = sha256[:ID_DIGITS]

    rows_by_table = dict[Path, dict[int, _Row]]()
    for table, paths in (lists | hashed).items():
        folder = _output_folder(table)
        rows = {
            number: _Row(path, ids.get((folder, path), ""))
            for number, path in enumerate(paths)
            if isinstance(path, str) and path != FORGOTTEN["path"]
        }
        rows_by_table[table] = {
            number: row for number, row in rows.items() if wanted.has_row(row)
        }
    return rows_by_table


def _output_folder(table: Path) -> Path:
    """Return the output folder of `classify` that holds *table*."""
    return table.parent.parent if table.parent.name == ROWS_FOLDER else table.parent


def _lock_output(folder: Path, locks: ExitStack) -> None:
    """Keep runs of `classify` out of *folder* until *locks* are closed.

    Does nothing without the file in which a run keeps its state: then *folder* is no output
    folder of `classify`. On a file system without locks, it keeps none out. Raises `DataError`
    if a run writes to *folder*, and `StorageError` if the lock cannot be opened.
    """
    if not (folder / STATE).exists():
        return

    with writing(folder):
        try:
            lock = lock_file(folder / LOCK)
        except BlockingIOError as error:
            raise DataError(
                f"{folder}: a run of `classify` is writing to it; wait for it"
            ) from error

    locks.callback(os.close, lock.file)


def _check_format(table: Path) -> None:
    """Raise `DataError` if *table* is damaged, or of a later format than this version can rewrite."""
    import pyarrow.parquet as pq  # of an extra

    try:
        check_schema(pq.read_schema(table))
    except ValueError as error:  # also of pyarrow, for a damaged file
        raise DataError(f"{table}: {error}") from error


def _empty_rows(table: Path, numbers: Sequence[int]) -> None:
    """Empty the rows *numbers* of *table*, which keeps its number of rows, so that a run can continue."""
    import pyarrow as pa  # of an extra
    import pyarrow.parquet as pq

    with pq.ParquetFile(table) as file:
        schema = file.schema_arrow
        groups = [file.read_row_group(number) for number in range(file.num_row_groups)]

    num_before = 0  # rows of earlier groups
    with (
        atomic_write(table, durable=True) as partial,
        pq.ParquetWriter(partial, schema, compression="zstd") as writer,
    ):
        # Row groups stay as they were; every row keeps its place.
        for group in groups:
            emptied = [  # positions in the group
                number - num_before
                for number in numbers
                if 0 <= number - num_before < group.num_rows
            ]

            columns = []
            for field in schema:
                values = group[field.name].to_pylist()
                for row in emptied:
                    values[row] = FORGOTTEN.get(field.name)
                columns.append(pa.array(values, field.type))

            writer.write_table(pa.table(columns, schema=schema))
            num_before += group.num_rows
