"""A server keeps photos that are worth a label, outside of requests, and within the limits of its folder."""

import base64
import errno
import hashlib
import io
import itertools
import json
import logging
import os
import shutil
import signal
import stat
import time
from collections import Counter
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, get_args

import httpx
import numpy as np
import pytest
from PIL import Image

from sopdeploy.base import files
from sopdeploy.bundle.decision import Decision, Rejection
from sopdeploy.bundle.folder import Bundle, open_bundle
from sopdeploy.data.photos.kept import LABEL_CONFIG, NOT_OURS, SAMPLED
from sopdeploy.errors import StorageError
from sopdeploy.images.metadata import copy_without_metadata
from sopdeploy_service import keep
from sopdeploy_service.inference.results import Prediction
from sopdeploy_service.keep import Keeper, KeptResult, reasons_to_keep
from sopdeploy_service.kept_folder import FILE_BLOCK, SPARE, KeptFolder, folder_name
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.settings import Settings
from tests.support.children import serving
from tests.support.crashes import LOSSES, end_at_each_step
from tests.support.pictures import encoded
from tests.support.service import LABELS, deciding, running, wait_for, write_bundle

UNSAMPLED = Settings(keep_sample=0.0)
NEVER = "f" * 64  # a hash outside of every sample below 1


def rejecting_all(bundle: Bundle) -> Bundle:
    return deciding(bundle, Decision(rejection=Rejection(threshold=1e9)))


def photos(count: int) -> list[bytes]:
    """JPEGs of random cells with a place in their EXIF data."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8825)[27] = b"SECRET"
    found = []
    for seed in range(count):
        cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
        image = Image.fromarray(cells).resize((80, 64), Image.Resampling.NEAREST)
        found.append(encoded(image, "JPEG", exif=exif))
    return found


def results(client: httpx.Client) -> dict[str, int]:
    lines = [
        line
        for line in client.get("/metrics").text.splitlines()
        if line.startswith("sopdeploy_kept_images")
    ]
    found: Counter[str] = Counter()
    for line in lines:
        found[line.partition('result="')[2].partition('"')[0]] += int(
            float(line.rpartition(" ")[2])
        )
    return {name: count for name, count in found.items() if count}


def read_records(folder: Path) -> dict[Path, dict[str, Any]]:
    """Read the `data` of each kept photo; each has a record, and each file is one of both."""
    paths = [path for path in folder.glob("*/*") if path.suffix in {".jpg", ".png"}]
    return {
        path: json.loads(path.with_suffix(".json").read_text())["data"]
        for path in sorted(paths)
    }


def id_of(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()[:32]


@pytest.fixture(autouse=True)
def _time_to_write(monkeypatch) -> None:
    """However fast photos come, all may."""
    monkeypatch.setattr(keep, "PAUSE", 0.0)


MARGINS = {
    "far": ([4.0, 0.0, 0.0], {}, []),
    "close": ([1.0, 0.9, -5.0], {}, ["low margin"]),
    "one class": ([1.0], {}, []),
    "unknown": ([4.0, 0.0], {"rejection": Rejection(threshold=5.0)}, ["unknown"]),
    "known": ([4.0, 0.0], {"rejection": Rejection(threshold=3.0)}, []),
    "several classes": ([4.0, -4.0], {"activation": "sigmoid", "thresholds": (0.5, 0.5)}, []),
    "close to one": (
        [4.0, -4.0],
        {"activation": "sigmoid", "thresholds": (0.5, 0.1)},
        ["low margin"],
    ),
}


@pytest.mark.parametrize(("logits", "decision", "expected"), MARGINS.values(), ids=MARGINS)
def test_unknown_and_uncertain_photos_are_worth_a_label(
    bundle, logits, decision, expected
) -> None:
    found = reasons_to_keep(
        deciding(bundle, Decision(**decision)), np.array(logits, np.float32), NEVER, 0.5
    )
    assert found == expected


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_the_sample_is_a_share_of_all_files_whatever_they_show(bundle, share: float) -> None:
    sure = np.array([9.0, 0.0], np.float32)
    hashes = [hashlib.sha256(b"%d" % number).hexdigest() for number in range(4000)]
    found = [tuple(reasons_to_keep(bundle, sure, sha256, share)) for sha256 in hashes]

    assert set(found) <= {(), ("sample",)}
    assert (
        abs(found.count(("sample",)) - 4000 * share) <= 3 * (4000 * share * (1 - share)) ** 0.5
    )


HOSTILE = [
    *("..", ".", "../../etc", "/etc/passwd", "a/b", "a\\b", "~", ".hidden", "end.", " space "),
    *("C:", "a\0b", "a\nb", "%2F", "con|pipe", "\N{ZERO WIDTH SPACE}", LABEL_CONFIG, "é" * 400),
    *("x" * 1000, "-rf", f"{'0' * 32}.jpg", "CON", "a" * 99, "a" * 100, "a" * 101),
]


def test_the_folder_of_a_class_is_always_below_the_folder(tmp_path: Path) -> None:
    names = [folder_name(label) for label in HOSTILE]
    assert len(set(names)) == len(HOSTILE)
    assert LABEL_CONFIG not in names

    for name in names:
        (tmp_path / name).mkdir()
        assert (tmp_path / name).resolve().parent == tmp_path.resolve()
        assert len(name.encode()) <= 100
        assert not name.startswith(".")
    assert {path.name for path in tmp_path.iterdir()} == set(names)


@pytest.mark.parametrize("label", ["cat", "großer Hund", "shih-tzu", "猫", "T shirt"])
def test_the_name_of_a_usual_class_stays(label: str) -> None:
    assert folder_name(label) == label


def test_nothing_is_on_disk_without_the_setting(
    bundle, onnx_runtime: OnnxRuntime, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with running(onnx_runtime, rejecting_all(bundle), Settings()) as client:
        for body in photos(3):
            assert client.post("/v1/classify", content=body).json()["known"] is False

    assert list(tmp_path.iterdir()) == []


def test_an_unknown_photo_is_kept_below_its_predicted_class_without_its_place(
    bundle, onnx_runtime: OnnxRuntime, tmp_path: Path
) -> None:
    (body,) = photos(1)
    unknown = rejecting_all(bundle)
    settings = Settings(keep=tmp_path / "kept", keep_sample=0)
    with running(onnx_runtime, unknown, settings) as client:
        response = client.post("/v1/classify?top_k=7", content=body).json()
        wait_for(lambda: results(client) == {"kept": 1})
    ((path, record),) = read_records(tmp_path / "kept").items()

    # The image is the same, without its metadata.
    kept = path.read_bytes()
    assert b"SECRET" in body
    assert b"SECRET" not in kept

    before = Image.open(io.BytesIO(body))
    after = Image.open(io.BytesIO(kept))
    assert dict(after.getexif()) == {0x0112: 6}
    assert np.array_equal(np.asarray(before), np.asarray(after))

    # The record says what was predicted, and is a task of Label Studio with a prediction.
    best = response["classes"][0]["label"]
    assert path.relative_to(tmp_path) == Path("kept", best, f"{id_of(body)}.jpg")
    assert record["image"] == f"/data/local-files/?d=kept/{best}/{path.name}"
    assert record["predicted"] == best
    assert record["probabilities"] == {
        entry["label"]: pytest.approx(entry["probability"]) for entry in response["classes"]
    }
    assert record["bundle"] == unknown.manifest.id
    assert record["model"] == "tiny"
    assert record["known"] is False
    assert record["score"] == pytest.approx(response["score"])
    assert "unknown" in record["reasons"].split(", ")

    task = json.loads(path.with_suffix(".json").read_text())
    assert task["predictions"][0]["result"][0]["value"] == {"choices": [NOT_OURS]}

    config = (tmp_path / "kept" / LABEL_CONFIG).read_text()
    assert all(f'"{name}"' in config for name in (*LABELS, NOT_OURS))


def test_only_files_that_are_classified_are_kept(
    bundle, onnx_runtime: OnnxRuntime, tmp_path: Path
) -> None:
    first, second, third = photos(3)
    settings = Settings(keep=tmp_path, keep_sample=1)
    tensor = {
        "name": "images",
        "shape": [1, 32, 32, 3],
        "datatype": "UINT8",
        "data": [0] * 3072,
    }
    with running(onnx_runtime, bundle, settings) as client:
        assert (
            client.post("/v2/models/tiny/infer", json={"inputs": [tensor]}).status_code == 200
        )
        assert client.post("/v1/classify", content=b"no image").status_code == 415

        files = [("image", first), ("image", b"no image"), ("image", second)]
        assert client.post("/v1/classify", files=files).status_code == 200

        text = {"image": base64.b64encode(third).decode()}
        assert client.post("/v1/classify", json=text).status_code == 200

        wait_for(lambda: sum(results(client).values()) >= 3)
        assert results(client) == {"kept": 3}
    names = {f"{id_of(body)}{SAMPLED}.jpg" for body in (first, second, third)}

    assert {path.name for path in read_records(tmp_path)} == names


def test_a_reported_image_is_kept_with_its_suggestion(tmp_path, bundle, onnx_runtime):
    low, sure = photos(2)
    with running(onnx_runtime, bundle, Settings(keep=tmp_path, keep_sample=1.0)) as client:
        assert client.get("/info").json()["keeps"] is True

        wrong = client.post("/v1/classify?reported=a%00b", content=low)
        assert (wrong.status_code, wrong.json()["code"]) == (400, "malformed_request")

        explained = client.post("/v1/classify?reported=cat&explain=true", content=low)
        assert (explained.status_code, explained.json()["code"]) == (400, "malformed_request")
        for query in ("", "?reported=a new class", "?reported="):
            assert client.post(f"/v1/classify{query}", content=low).status_code == 200
        assert client.post("/v1/classify?reported=", content=sure).status_code == 200

        wait_for(lambda: sum(results(client).values()) == 4)
    kept = {path.name[:32]: record for path, record in read_records(tmp_path).items()}
    first, second = (kept[id_of(image)] for image in (low, sure))

    assert {"sample", "reported"} <= {*first["reasons"].split(", ")}
    assert first["suggested"] == "a new class"
    assert "reported" in second["reasons"].split(", ")
    assert second["suggested"] is None


class KeeperOfTests(Keeper):
    """A keeper without decoder processes, to which a test offers photos that *bundle* predicts."""

    def __init__(self, folder: Path, bundle: Bundle, settings: Settings = UNSAMPLED) -> None:
        self.metrics = Metrics()
        self.served = SimpleNamespace(name="tiny", bundle=bundle)
        super().__init__(folder, settings, self.metrics, copy_without_metadata)

    def take(self, *bodies: bytes, reported: str | None = None) -> None:
        for body in bodies:
            logits = np.roll(np.arange(7, dtype=np.float32), body[-3])
            prediction = Prediction({"logits": logits}, {}, np.zeros((32, 32, 3), np.uint8))
            self.offer(self.served, body, prediction, reported)  # type: ignore[arg-type]

    def counts(self) -> dict[str, float]:
        """Work until the queue is empty; return the results that occurred."""
        self.start()
        self.stop()
        found = {
            name: self.metrics.registry.get_sample_value(
                "sopdeploy_kept_images_total", {"result": name}
            )
            for name in get_args(KeptResult)
        }
        return {name: count for name, count in found.items() if count}


def test_a_full_queue_drops_and_counts(bundle, monkeypatch, tmp_path) -> None:
    keeper = KeeperOfTests(tmp_path, rejecting_all(bundle))
    bodies = photos(6)
    monkeypatch.setattr(keep, "MAX_QUEUED_PHOTOS", 3)
    keeper.take(*bodies[:5])

    # Room for more photos, and for one byte less than those of the queue and another one
    monkeypatch.setattr(keep, "MAX_QUEUED_PHOTOS", 100)
    monkeypatch.setattr(keep, "MAX_QUEUED_BYTES", sum(map(len, [*bodies[:3], bodies[5]])) - 1)
    keeper.take(bodies[5])

    assert keeper.counts() == {"kept": 3, "dropped": 3}


# the share of the sample, and what becomes of four photos that come at once
TOO_FAST = {"others": (0.0, {"kept": 2, "dropped": 2}), "the sample": (1.0, {"kept": 4})}


@pytest.mark.parametrize(("share", "expected"), TOO_FAST.values(), ids=TOO_FAST)
def test_only_the_sample_is_kept_however_fast_photos_come(
    bundle, monkeypatch, tmp_path, share: float, expected: dict[str, int]
) -> None:
    monkeypatch.setattr(keep, "PAUSE", 3600.0)
    monkeypatch.setattr(keep, "BURST", 3600.0)
    keeper = KeeperOfTests(tmp_path, rejecting_all(bundle), Settings(keep_sample=share))
    keeper.take(*photos(4))

    assert keeper.counts() == expected


def test_a_damaged_file_and_a_bug_do_not_end_keeping(
    bundle, caplog, tmp_path, monkeypatch
) -> None:
    good, bug, last = photos(3)
    keeper = KeeperOfTests(tmp_path, rejecting_all(bundle))
    add = KeptFolder.add

    def add_or_fail(self: KeptFolder, name: str, *values: Any) -> str:
        if name.startswith(id_of(bug)):
            raise RuntimeError("bug")
        return add(self, name, *values)

    monkeypatch.setattr(KeptFolder, "add", add_or_fail)
    keeper.take(b"no image", good, bug, last)
    assert keeper.counts() == {"kept": 2, "dropped": 1, "failed": 1}
    assert "is not kept" in caplog.text


def test_a_photo_that_another_bundle_predicts_moves_to_its_new_class(bundle, tmp_path) -> None:
    (body,) = photos(1)
    keeper = KeeperOfTests(tmp_path, bundle, Settings(keep_sample=1.0))
    keeper.take(body, reported="hat")
    # The bundle is replaced while the photo waits.
    labels = (*bundle.labels[1:], "new")
    new = SimpleNamespace(manifest=bundle.manifest.model_copy(), labels=labels)
    keeper.served.bundle = new
    keeper.take(body)
    assert keeper.counts() == {"kept": 2}

    ((path, record),) = read_records(tmp_path).items()
    assert path.parent.name == record["predicted"]
    assert record["predicted"] in labels
    assert (record["reasons"], record["suggested"]) == ("sample, reported", "hat")


def test_several_classes_per_image_keep_below_the_most_probable_one(bundle, tmp_path) -> None:
    thresholds = (0.99, 0.99, 0.99, 0.99, 0.9, 0.9, 0.9)
    decision = Decision(activation="sigmoid", thresholds=thresholds)
    keeper = KeeperOfTests(tmp_path, deciding(bundle, decision), Settings(keep_sample=1.0))
    body = photos(1)[0]
    keeper.take(body)

    assert keeper.counts() == {"kept": 1}

    ((path, record),) = read_records(tmp_path).items()
    assert (
        path.parent.name
        == record["predicted"]
        == max(record["probabilities"], key=record["probabilities"].__getitem__)
    )
    assert 'choice="multiple"' in (tmp_path / LABEL_CONFIG).read_text()


def test_the_classes_of_all_bundles_are_listed_and_what_somebody_adds_stays(
    bundle, tmp_path
) -> None:
    (tmp_path / LABEL_CONFIG).write_text(
        '<View><Image name="image" value="$image"/><Choices name="class" toName="image">'
        '<Choice value="mine"/><Choice value="a &amp; b"/></Choices></View>'
    )
    keeper = KeeperOfTests(tmp_path, rejecting_all(bundle))
    keeper.take(*photos(2))

    assert keeper.counts() == {"kept": 2}

    config = (tmp_path / LABEL_CONFIG).read_text()
    assert config.count("<Choice ") == 3 + len(bundle.labels)
    assert all(f'"{name}"' in config for name in (*bundle.labels, "mine", "a &amp; b"))


PHOTO = b"x" * FILE_BLOCK  # one block, and one for its record
PAIR = 2 * FILE_BLOCK


def fields(label: str = "cat", **changes: Any) -> dict[str, Any]:
    """The fields of a record."""
    return {
        "predicted": label,
        "choices": [label],
        "probabilities": {label: 1.0},
        "known": True,
        "score": None,
        "bundle": "b" * 64,
        "model": "tiny",
        "time": "2026-11-30T00:00:00+00:00",
        "reasons": ["low margin"],
        "suggested": None,
        "written_by": "0.4.0",
    } | changes


def name_of(number: int, *, sample: bool = False) -> str:
    return f"{number:032x}{SAMPLED if sample else ''}.jpg"


def numbers(folder: Path) -> list[int]:
    return sorted(int(path.name[:32], 16) for path in read_records(folder))


def size_of(folder: Path) -> int:
    sizes = (file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return sum(-(-size // FILE_BLOCK) for size in sizes) * FILE_BLOCK


def kept_folder(path: Path, num_photos: float = 1000, days: float = 30) -> KeptFolder:
    """A folder that has room for *num_photos* beside the share that stays free."""
    limit = int(num_photos * PAIR / (1 - SPARE)) + 1
    return KeptFolder(path, limit, 86_400 * days)


# Which of the arriving photos are of the sample, and which of them remain of room for three.
EVICTIONS = {
    "oldest first": ([0, 0, 0, 0, 0], [2, 3, 4]),
    "a small sample stays": ([1, 0, 0, 0, 0, 0], [0, 4, 5]),
    "a large sample makes room": ([1, 1, 0, 0], [1, 2, 3]),
}


@pytest.mark.parametrize(("arriving", "remaining"), EVICTIONS.values(), ids=EVICTIONS)
def test_the_oldest_makes_room(tmp_path: Path, arriving, remaining) -> None:
    kept = kept_folder(tmp_path, 3)
    for number, is_sample in enumerate(arriving):
        name = name_of(number, sample=bool(is_sample))
        assert kept.add(name, PHOTO, fields()) == "kept"
        os.utime(tmp_path / "cat" / name, (time.time() - 100 + number,) * 2)

    assert numbers(tmp_path) == remaining


def test_the_limit_holds_for_processes_that_do_not_see_each_other(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(files, "flush", lambda _file: None)  # which takes most of the time
    limit = 200 * PAIR
    processes = [KeptFolder(tmp_path, limit, 86_400.0) for _ in range(8)]
    random = Random(0)

    sizes = []
    for number in range(400):
        random.choice(processes).add(name_of(number), PHOTO, fields())
        if number % 10 == 0:
            sizes.append(size_of(tmp_path))

    assert 0.7 * limit <= max(sizes) <= limit


def test_a_photo_larger_than_the_limit_is_dropped(tmp_path: Path) -> None:
    kept = KeptFolder(tmp_path, 400 * PAIR, 86_400.0)

    assert kept.add(name_of(0), PHOTO * 1000, fields()) == "dropped"


def test_photos_expire_and_what_others_deleted_is_not_an_error(
    tmp_path: Path, monkeypatch
) -> None:
    kept = kept_folder(tmp_path, days=15)
    for number in range(4):
        kept.add(name_of(number), PHOTO, fields())
        age = 86_400 * 10 * (3 - number)
        os.utime(tmp_path / "cat" / name_of(number), (time.time() - age,) * 2)
    unlink = Path.unlink

    def come_second(path: Path, **options: bool) -> None:
        unlink(path, **options)  # by another process, after this one has listed the photos
        if path.name == name_of(0):
            raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "unlink", come_second)
    kept.delete_surplus()

    assert numbers(tmp_path) == [2, 3]


def test_a_photo_that_cannot_be_deleted_keeps_no_other_one(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    kept = kept_folder(tmp_path, days=1)
    unlink = Path.unlink

    def refuse(path: Path, **options: bool) -> None:
        if path.name == name_of(0):
            raise OSError(errno.EIO, "no")
        unlink(path, **options)

    for number in range(3):
        kept.add(name_of(number), PHOTO, fields())
        os.utime(tmp_path / "cat" / name_of(number), (1, 1))
    monkeypatch.setattr(Path, "unlink", refuse)
    for _ in range(2):
        kept.delete_surplus()
    assert numbers(tmp_path) == [0]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_only_old_records_without_a_photo_and_no_other_files_are_deleted(
    tmp_path: Path,
) -> None:
    kept = kept_folder(tmp_path, days=1)
    (tmp_path / "cat").mkdir()
    old = [f"{1:032x}.json", f"{2:032x}{SAMPLED}.json", f"{3:032x}.jpg", f"{4:032x}.png"]
    others = ["photo.jpg", "notes.json", f"{7:032x}.gif", f"{7:031x}.jpg", LABEL_CONFIG]
    for folder, name in itertools.product((tmp_path, tmp_path / "cat"), (*old, *others)):
        (folder / name).write_bytes(b"1")
        os.utime(folder / name, (1, 1))
    (tmp_path / "cat" / f"{9:032x}.json").write_bytes(b"1")  # its photo may come now
    (tmp_path / f"{8:032x}.jpg").mkdir()
    (tmp_path / "outside").mkdir()
    shutil.move(tmp_path / "outside", tmp_path.parent / "outside")
    (tmp_path.parent / "outside" / old[2]).write_bytes(b"1")
    os.utime(tmp_path.parent / "outside" / old[2], (1, 1))
    (tmp_path / "link").symlink_to(tmp_path.parent / "outside")

    kept.delete_surplus()
    remaining = {path.name for path in (tmp_path / "cat").iterdir()}
    assert remaining == {*others, f"{9:032x}.json"}
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {*others}
    assert (tmp_path.parent / "outside" / old[2]).exists()


def test_photos_expire_while_nothing_is_sent(bundle, onnx_runtime, tmp_path: Path) -> None:
    settings = Settings(keep=tmp_path, keep_sample=1, keep_days=0.5 / 86_400)
    with running(onnx_runtime, bundle, settings) as client:
        client.post("/v1/classify", content=photos(1)[0])
        wait_for(lambda: results(client) == {"kept": 1})
        wait_for(lambda: numbers(tmp_path) == [])


def test_only_the_owner_can_read_the_keys(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "kept"
    mask = os.umask(0)
    try:
        assert kept_folder(folder).add(name_of(0), PHOTO, fields()) == "kept"
    finally:
        os.umask(mask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "cat")}

    assert modes == {0o700}

    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}

    (tmp_path / "film.mov").write_bytes(PHOTO)
    with pytest.raises(StorageError, match="cannot be written"):
        kept_folder(tmp_path / "film.mov" / "kept")


def test_a_folder_that_somebody_moves_away_is_made_again(tmp_path: Path) -> None:
    kept = kept_folder(tmp_path / "kept")
    assert kept.add(name_of(0), PHOTO, fields()) == "kept"

    (tmp_path / "kept").rename(tmp_path / "photos")
    kept.delete_surplus()
    assert kept.add(name_of(1), PHOTO, fields()) == "kept"
    assert numbers(tmp_path / "kept") == [1]
    assert numbers(tmp_path / "photos") == [0]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("suffix", [".json", ".jpg"])
def test_a_full_disk_stops_keeping_with_one_warning_until_it_works_again(
    tmp_path: Path, monkeypatch, caplog, bundle, code, suffix
) -> None:
    first, *while_full, last = photos(4)
    without_room = [id_of(body) for body in while_full]
    write = Path.write_bytes

    def write_if_there_is_room(path: Path, content: bytes) -> int:
        if suffix in path.name and path.name[:32] in without_room:
            with path.open("wb") as file:
                file.write(content[:100])
            raise OSError(code, os.strerror(code))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_if_there_is_room)
    caplog.set_level(logging.WARNING, "sopdeploy.keep")
    keeper = KeeperOfTests(tmp_path, rejecting_all(bundle))
    keeper.take(first, *while_full, last)

    assert keeper.counts() == {"kept": 2, "failed": 2}
    # It cannot be written, and it can be written again.
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert {path.name[:32] for path in tmp_path.glob("*/*")} == {id_of(first), id_of(last)}
    assert len(read_records(tmp_path)) == 2


def test_a_record_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch) -> None:
    kept = kept_folder(tmp_path)
    kept.add(name_of(0), PHOTO, fields())
    before = {path: path.read_bytes() for path in tmp_path.glob("*/*")}

    def refuse(_path: Path, _content: bytes) -> int:
        raise OSError(errno.ENOSPC, "no")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(OSError, match="no"):
        kept.add(name_of(0), PHOTO, fields())
    assert {path: path.read_bytes() for path in tmp_path.glob("*/*")} == before


TIME = keep.datetime.now(keep.UTC)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_a_process_killed_at_any_step_loses_no_photo(tmp_path: Path, loss: str) -> None:
    """It adds a photo, for which the oldest one makes room, and then predicts another class for it."""
    bodies = {number: b"%d" % number * 4096 for number in range(3)}
    start = tmp_path / "start"
    folder = tmp_path / "kept"
    said = tmp_path / "said"
    for number in (0, 1):
        kept_folder(start, 2).add(name_of(number), bodies[number], fields())
        os.utime(start / "cat" / name_of(number), (time.time() - 9 + number,) * 2)

    def restart() -> None:
        files._CLEANED.clear()  # as in a new process
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder)
        said.write_text("")

    def add() -> None:
        kept = kept_folder(folder, 2)
        for label in ("cat", "dog"):
            said.write_text(kept.add(name_of(2), bodies[2], fields(label)))

    ends = 0
    for ends in end_at_each_step(folder, LOSSES[loss], restart, add):
        for path, record in read_records(folder).items():
            assert path.read_bytes() == bodies[int(path.stem, 16)], ends
            assert record["predicted"] == path.parent.name, ends
        assert {1} <= {*numbers(folder)}, ends
        assert said.read_text() == "" or 2 in numbers(folder), ends

        # The next process deletes what is incomplete.
        for file in folder.glob("*/*.json"):
            if not file.with_suffix(".jpg").exists():
                os.utime(file, (1, 1))
        kept_folder(folder, 2).delete_surplus()
        remaining = [file for file in folder.rglob("*") if file.is_file()]
        assert len(remaining) == 2 * len(read_records(folder)), ends
    assert ends > 15


@pytest.mark.slow
def test_two_servers_share_a_folder_while_one_is_killed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    live = tmp_path / "live"
    bundles = [write_bundle(tmp_path / f"bundle-{seed}", seed=seed) for seed in (0, 1)]
    live.symlink_to(bundles[0])
    options = (str(live), f"--setting=keep={kept}", "--setting=keep_sample=1")
    bodies = photos(40)

    with serving(*options) as first, serving(*options) as second:
        for number, body in enumerate(bodies[:30]):
            client = (first, second)[number % 2]
            assert client.post("/v1/classify", content=body).status_code == 200

        # What the first server has counted as kept is there, and stays there.
        counted = results(first)["kept"]
        first.child.kill()
        assert len(read_records(kept)) >= counted
        wait_for(lambda: results(second) == {"kept": 15})

        live.unlink()
        live.symlink_to(bundles[1])
        second.child.send_signal(signal.SIGHUP)
        new = open_bundle(bundles[1]).manifest.id
        wait_for(lambda: new in second.get("/info").text)
        for body in bodies[20:]:
            assert second.post("/v1/classify", content=body).status_code == 200
        wait_for(lambda: results(second) == {"kept": 35})

    records = read_records(kept)
    assert len(records) >= counted + 15 + 10
    assert {path.name[:32] for path in records} <= {id_of(body) for body in bodies}
    by_name = {path.name[:32]: (path, record) for path, record in records.items()}
    assert len(by_name) == len(records)  # a photo that both bundles predict is kept once
    assert {by_name[id_of(body)][1]["bundle"] for body in bodies[20:]} == {new}
    for path in records:
        with Image.open(path) as image:
            image.load()
