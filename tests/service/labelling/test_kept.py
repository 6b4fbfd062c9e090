"""Records of kept photographs: what a reader accepts, and hashes that find copies."""

import errno
import io
import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pydantic
import pytest
from PIL import Image, ImageEnhance

from sopdeploy.files import LOCK
from sopdeploy.images.near_hash import NEAR_BITS, near_hash
from sopdeploy_service.labelling.kept import KeptRecord, read_kept

NAME = f"{7:032x}"


def record_of(name: str = NAME, **changes: object) -> KeptRecord:
    given = {
        "image": f"{name}.jpg",
        "bundle": "b" * 64,
        "model": "photos",
        "time": datetime(2026, 11, 23, tzinfo=UTC),
        "reasons": ("low_margin",),
        "labels": ("hat", "shoe"),
        "logits": (0.5, 0.25),
        "near_hash": "0" * 16,
    }
    return KeptRecord(**given | changes)


def write(folder: Path, record: KeptRecord) -> None:
    (folder / record.image).write_bytes(b"image")
    (folder / record.image).with_suffix(".json").write_text(record.model_dump_json())


def scene(seed: int) -> Image.Image:
    """Smooth random colours of 160 x 120 pixels."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(cells).resize((160, 120), Image.Resampling.BICUBIC)


def hash_of(image: Image.Image) -> int:
    return int(near_hash(np.asarray(image.convert("RGB"))), 16)


def encoded(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


@pytest.mark.parametrize(
    "changes",
    [
        {"image": "../secret.jpg"},
        {"image": f"/etc/{NAME}.jpg"},
        {"image": f"{NAME}.html"},
        {"image": f"{NAME}.jpg\n"},
        {"near_hash": "xyz"},
        {"reasons": ()},
        {"reasons": ("because",)},
        {"logits": (0.5,)},
        {"labels": (), "logits": ()},
        {"labels": ("hat",), "logits": ()},
        {"logits": (0.5, float("nan"))},
        {"time": datetime(2026, 11, 23)},  # without a time zone
        {"extra": 1},
    ],
)
def test_a_record_names_a_file_beside_it_and_is_complete(changes) -> None:
    with pytest.raises(pydantic.ValidationError):
        record_of(**changes)


def test_complete_photographs_are_read_oldest_first(tmp_path: Path) -> None:
    newer = record_of(f"{1:032x}", time=datetime(2026, 11, 24, tzinfo=UTC))
    write(tmp_path, newer)
    write(tmp_path, record_of())
    assert read_kept(tmp_path) == [
        (tmp_path / f"{NAME}.jpg", record_of()),
        (tmp_path / newer.image, newer),
    ]


def test_photographs_that_an_earlier_version_kept_for_each_device_are_read(
    tmp_path: Path,
) -> None:
    for number, device in enumerate(("0", "1", "other")):
        (tmp_path / device).mkdir()
        write(tmp_path / device, record_of(f"{number:032x}"))
        if device != "other":  # which no server has locked
            (tmp_path / device / LOCK).touch()
    assert [image.parent.name for image, _ in read_kept(tmp_path)] == ["0", "1"]


def test_a_folder_beside_the_photographs_that_cannot_be_read_hides_none(
    tmp_path: Path, monkeypatch
) -> None:
    """As `lost+found` of a disk, which only the administrator can read."""
    write(tmp_path, record_of())
    (tmp_path / "lost+found").mkdir()
    status = os.stat

    def refuse(path: str | Path, **options: bool) -> os.stat_result:
        if Path(path).parent.name == "lost+found":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return status(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    assert [image.name for image, _ in read_kept(tmp_path)] == [f"{NAME}.jpg"]


def test_what_is_not_a_complete_photograph_is_skipped_and_counted(
    tmp_path: Path, caplog
) -> None:
    write(tmp_path, record_of())
    text = record_of().model_dump_json()
    (tmp_path / f"{1:032x}.json").write_text(text[: len(text) // 2])
    (tmp_path / f"{2:032x}.json").write_bytes(b"\xff")
    (tmp_path / f"{3:032x}.json").write_text(
        record_of(f"{3:032x}").model_dump_json()
    )  # without photograph
    (tmp_path / f"{4:032x}.json").write_text(text)  # with the photograph of another record
    (tmp_path / f"{5:032x}.json").write_text(json.dumps([1]))
    (tmp_path / f"{6:032x}.json").mkdir()
    (tmp_path / f"{8:032x}.json").write_text(record_of(f"{8:032x}").model_dump_json())
    (tmp_path / f"{8:032x}.jpg").symlink_to(tmp_path / f"{NAME}.jpg")
    (tmp_path / f"{9:032x}.jpg").write_bytes(b"no record yet")
    (tmp_path / "notes.txt").write_text("of a user")
    with caplog.at_level(logging.WARNING, "sopdeploy_service.labelling.kept"):
        assert [record.image for _, record in read_kept(tmp_path)] == [f"{NAME}.jpg"]
    assert "7 records are damaged or have no photo" in caplog.text


@pytest.mark.parametrize(
    "copy",
    [
        lambda image: encoded(image, 50),
        lambda image: encoded(image.resize((80, 60)), 75),
        lambda image: ImageEnhance.Brightness(image).enhance(0.8),
        lambda image: image.convert("L"),
    ],
    ids=["re-encoded", "smaller", "darker", "gray"],
)
def test_copies_have_near_hashes_and_other_photographs_do_not(copy) -> None:
    hashes = [hash_of(scene(seed)) for seed in range(20)]
    for seed, own in enumerate(hashes):
        distances = [(hash_of(copy(scene(seed))) ^ other).bit_count() for other in hashes]
        assert [distance <= NEAR_BITS for distance in distances] == [
            other == own for other in hashes
        ]
