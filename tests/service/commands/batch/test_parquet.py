"""Images in parquet files: the rows of `classify` and of actors of Ray, errors, limits before reading."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sopdeploy.errors import DataError, ImageError
from sopdeploy_service.commands.batch import parquet
from sopdeploy_service.commands.batch.listing import write_list
from sopdeploy_service.commands.batch.reader import ListedImage, Reader
from sopdeploy_service.commands.batch.sources import list_entries
from tests.service.commands.batch.conftest import (
    BAD,
    COUNT,
    OPTIONS,
    SETTINGS,
    STRUCT,
    StopError,
    classify,
    part_bytes,
    rows_of,
    stop_at,
    write_shard,
)

BODIES = [b"zero", b"one", None, b"three", b"four" * 40]


def hugging_face(bodies: list[bytes | None]) -> pa.Table:
    cells = [None if body is None else {"bytes": body, "path": "x.jpg"} for body in bodies]
    return pa.table(
        {"label": list(range(len(bodies))), "image": pa.array(cells, STRUCT), "name": ["x"] * len(bodies)}
    )


TABLES = {
    "structs of Hugging Face": hugging_face,
    "bytes of Ray Data": lambda bodies: pa.table(
        {"bytes": pa.array(bodies, pa.binary()), "path": ["x"] * len(bodies)}
    ),
    "large bytes": lambda bodies: pa.table({"photo": pa.array(bodies, pa.large_binary())}),
    "image beside a mask": lambda bodies: pa.table({"mask": [b"m"] * len(bodies), "image": bodies}),
    "a column with a dot": lambda bodies: pa.table({"the.photo": pa.array(bodies, pa.binary())}),
}


@pytest.mark.parametrize("layout", TABLES)
def test_rows_are_listed_from_metadata_and_read_in_any_order(layout, tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(TABLES[layout](BODIES), file, row_group_size=2)
    entries = list(list_entries([str(file)]))
    assert [(entry.path, entry.offset) for entry in entries] == [(f"{file}/{row}", row) for row in range(5)]
    reader = Reader(max_bytes=50)
    for order in (entries, entries[::-1], entries[1::2], entries[3:] + entries[:1]):
        for entry in order:
            body = BODIES[entry.offset]
            if body is None:
                with pytest.raises(ImageError, match=r"cannot be read \(the cell has no bytes\)"):
                    reader.read(entry)
            else:
                assert reader.read(entry) == body[:51]
    reader.close()


@pytest.fixture(scope="module")
def shard(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of `photos` in their order, in row groups of 15."""
    file = tmp_path_factory.mktemp("parquet") / "shard.parquet"
    write_shard(sorted(photos.glob("*.jpg")), file)
    return file


def without_path(out: Path) -> list[dict[str, Any]]:
    return [{**row, "path": None} for row in rows_of(out)]


def test_the_rows_are_those_of_the_same_files_also_after_an_interruption_and_by_actors(
    bundle_path, shard, complete, tmp_path
):
    on_ray = pytest.importorskip("sopdeploy_service.commands.batch.on_ray")
    out = tmp_path / "out"
    with pytest.raises(StopError):
        classify(bundle_path, [str(shard)], out, on_progress=stop_at(33))
    found = classify(bundle_path, [str(shard)], out)
    assert (found.num_images, found.num_errors, found.classified) == (COUNT, len(BAD), COUNT - 32)
    assert without_path(out) == without_path(complete)
    assert rows_of(out)[7]["path"] == f"{shard}/7"

    by_actor, job = shutil.copytree(out, tmp_path / "ray"), on_ray.Job(bundle_path, SETTINGS, OPTIONS)
    for part in (by_actor / "rows").iterdir():
        part.unlink()
    actor = on_ray.PartActor(job, by_actor, job.run_state())
    assert sum(actor({"part": pa.array(range(4)).to_numpy()})["errors"]) == len(BAD)
    assert part_bytes(by_actor) == part_bytes(out)


def test_a_file_that_was_written_again_is_another_list(shard, tmp_path):
    file = shutil.copy(shard, tmp_path / "x.parquet")
    before = write_list(tmp_path / "list", list_entries([str(file)]), 32)
    assert write_list(tmp_path / "list", list_entries([str(file)]), 32) == before
    pq.write_table(pq.read_table(file), file, row_group_size=15, compression="zstd")
    assert write_list(tmp_path / "list", list_entries([str(file)]), 32)[0] != before[0]


def test_a_damaged_page_fails_the_rest_of_its_row_group_wherever_reading_begins(tmp_path):
    file = tmp_path / "x.parquet"
    bodies = [bytes([row]) * 2000 for row in range(20)]
    pq.write_table(hugging_face(bodies), file, row_group_size=10, data_page_size=1, write_batch_size=5,
                   use_dictionary=False, compression="gzip")  # fmt: skip
    content = bytearray(file.read_bytes())
    chunk = pq.ParquetFile(file).metadata.row_group(0).column(1)
    pages = [at for at in range(chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size)
             if content[at : at + 3] == b"\x1f\x8b\x08"]  # fmt: skip
    content[pages[1] + 12 : pages[1] + 20] = b"\xff" * 8  # the second page of five rows
    file.write_bytes(content)
    entries = list(list_entries([str(file)]))
    for first in (0, 5, 7, 9):
        reader, failed = Reader(max_bytes=9999), {}
        for entry in entries[first:]:
            try:
                assert reader.read(entry) == bodies[entry.offset]
            except ImageError as error:
                failed[entry.offset] = str(error)
        reader.close()
        assert list(failed) == list(range(max(5, first), 10))
        assert len(set(failed.values())) == 1


def test_a_row_group_above_the_limit_is_not_read_and_its_neighbours_are(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MAX_ROW_GROUP", 1000)
    file = tmp_path / "x.parquet"
    pq.write_table(
        hugging_face([b"a" * 600, b"b", b"c" * 600, b"d" * 600, b"e"]),
        file,
        row_group_size=2,
        write_statistics=False,
    )
    reader = Reader(max_bytes=999)
    for entry in list_entries([str(file)]):
        if entry.offset in (2, 3):
            with pytest.raises(
                ImageError, match=r"its row group has 1,\d+ bytes of images, more than 1,000; write"
            ):
                reader.read(entry)
        else:
            assert reader.read(entry)
    reader.close()


FORGED = """
import re, sys
from pathlib import Path
from sopdeploy.errors import ImageError
from sopdeploy_service.commands.batch.reader import ListedImage, Reader
try:
    Reader(999).read(ListedImage("x", sys.argv[1], 0))
except ImageError as error:
    print(error)
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) < 150_000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is one of Linux")
def test_a_page_that_expands_beyond_what_the_file_states_is_an_error_of_its_rows(tmp_path):
    file = tmp_path / "x.parquet"
    size = 200_000_000
    pq.write_table(pa.table({"image": [bytes(size)]}), file, compression="zstd", use_dictionary=False,
                   write_statistics=False, write_page_index=False)  # fmt: skip
    stated = varint(pq.read_metadata(file).row_group(0).column(0).total_uncompressed_size)
    file.write_bytes(file.read_bytes().replace(stated, varint(1000, len(stated))))
    assert pq.read_metadata(file).row_group(0).column(0).total_uncompressed_size == 1000
    done = subprocess.run([sys.executable, "-c", FORGED, file], capture_output=True, text=True, check=True)
    assert done.stdout == f"cannot be read (malloc of size {size + 64} failed)\nTrue\n"


def varint(number: int, length: int = 0) -> bytes:
    """Encode a zigzag varint of Thrift, in *length* bytes if that is longer than needed."""
    number, encoded = 2 * number, bytearray()
    while number >= 128 or len(encoded) < length - 1:
        encoded.append(number % 128 + 128)
        number //= 128
    return bytes([*encoded, number])


BAD_FILES = {
    "text": (b"nothing", r"no parquet file with images \(.*\); write it again"),
    "no bytes": (
        pa.table({"label": [1], "name": ["x"]}),
        r"needs one column with the bytes of encoded images, but has 0\)",
    ),
    "several": (pa.table({"a": [b"x"], "b": [b"y"]}), r"but has 2 \(a, b\); name one of them image"),
    "a list": (pa.table({"image": [[b"x"]]}), "but has 0"),
    "no rows": (pa.table({"image": pa.array([], pa.binary())}), "has no images"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_without_a_column_of_images_is_one_line(case, tmp_path):
    content, message = BAD_FILES[case]
    file = tmp_path / "x.PARQUET"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        pq.write_table(content, file)
    with pytest.raises(DataError, match=message):
        list(list_entries([str(file)]))


def test_a_file_that_vanished_or_lost_rows_fails_its_rows(tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(hugging_face([b"a"]), file)
    reader = Reader(9)
    for entry in (ListedImage("x", str(file), 5), ListedImage("y", str(tmp_path / "y.parquet"), 0)):
        with pytest.raises(ImageError, match="cannot be read"):
            reader.read(entry)
    assert reader.read(ListedImage("x", str(file), 0)) == b"a"
    reader.close()
