"""A server keeps photographs that are worth a label, outside of requests, and within limits of its folder."""

import base64
import errno
import gc
import hashlib
import io
import itertools
import logging
import os
import shutil
import signal
import stat
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, tzinfo
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import httpx
import numpy as np
import pytest
from PIL import Image

from sopdeploy.bundle.folder import Bundle
from sopdeploy.decision import Decision, Rejection
from sopdeploy.errors import ConfigError, StorageError
from sopdeploy.images.metadata import copy_without_metadata
from sopdeploy_commands.labelling.forget import forget
from sopdeploy_service.inference.results import Prediction
from sopdeploy_service.labelling.keep import folder as kept_folder
from sopdeploy_service.labelling.keep import keeper as keep
from sopdeploy_service.labelling.keep.folder import FILE_BLOCK, KeptFolder, KeptResult
from sopdeploy_service.labelling.keep.keeper import Keeper, reasons_to_keep
from sopdeploy_service.labelling.kept import KeptRecord, read_kept
from sopdeploy_service.labelling.label.folders import LabelFolders
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.settings import Settings
from tests.service.labelling.test_kept import record_of
from tests.support.children import kills_itself
from tests.support.pictures import encoded
from tests.support.service import LABELS, deciding, running, wait_for

NEVER = "f" * 64  # a hash outside of every sample below 1


def rejecting_all(bundle: Bundle) -> Bundle:
    return deciding(bundle, Decision(rejection=Rejection(threshold=1e9)))


def photos(count: int) -> list[bytes]:
    """JPEGs of random cells with a place in their EXIF data."""
    exif = Image.Exif()
    exif[0x0112], exif.get_ifd(0x8825)[27] = 6, b"SECRET"
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


@pytest.fixture(autouse=True)
def _time_to_write(monkeypatch) -> None:
    """However fast photographs come, all may."""
    monkeypatch.setattr(keep, "PAUSE", 0.0)


MARGINS = {
    "far": ([4.0, 0.0, 0.0], {}, ()),
    "close": ([1.0, 0.9, -5.0], {}, ("low_margin",)),
    "one class": ([1.0], {}, ()),
    "unknown": ([4.0, 0.0], {"rejection": Rejection(threshold=5.0)}, ("unknown",)),
    "known": ([4.0, 0.0], {"rejection": Rejection(threshold=3.0)}, ()),
    "several classes": ([4.0, -4.0], {"activation": "sigmoid", "thresholds": (0.5, 0.5)}, ()),
    "close to one": (
        [4.0, -4.0],
        {"activation": "sigmoid", "thresholds": (0.5, 0.1)},
        ("low_margin",),
    ),
}


@pytest.mark.parametrize(("logits", "decision", "expected"), MARGINS.values(), ids=MARGINS)
def test_unknown_and_uncertain_photographs_are_worth_a_label(
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
    found = [reasons_to_keep(bundle, sure, sha256, share) for sha256 in hashes]
    assert set(found) <= {(), ("sample",)}
    assert (
        abs(found.count(("sample",)) - 4000 * share) <= 3 * (4000 * share * (1 - share)) ** 0.5
    )


def test_nothing_is_on_disk_without_the_setting(
    bundle, onnx_runtime: OnnxRuntime, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with running(onnx_runtime, rejecting_all(bundle), Settings()) as client:
        for body in photos(3):
            assert client.post("/v1/classify", content=body).json()["known"] is False
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_photograph_is_kept_without_its_place(
    bundle, onnx_runtime: OnnxRuntime, tmp_path: Path
) -> None:
    (body,) = photos(1)
    unknown = rejecting_all(bundle)
    settings = Settings(keep=tmp_path / "kept", keep_sample=0)
    with running(onnx_runtime, unknown, settings) as client:
        response = client.post("/v1/classify?top_k=7", content=body).json()
        wait_for(lambda: results(client) == {"kept": 1})
    ((path, record),) = read_kept(tmp_path / "kept")
    kept = path.read_bytes()
    assert b"SECRET" in body
    assert b"SECRET" not in kept
    before, after = Image.open(io.BytesIO(body)), Image.open(io.BytesIO(kept))
    assert dict(after.getexif()) == {0x0112: 6}
    assert np.array_equal(np.asarray(before), np.asarray(after))
    assert path.name == f"{hashlib.sha256(body).hexdigest()[:32]}.jpg"
    assert (record.bundle, record.model, record.known) == (unknown.manifest.id, "tiny", False)
    assert (record.labels, record.score) == (tuple(LABELS), pytest.approx(response["score"]))
    best = record.labels[int(np.argmax(record.logits))]
    assert (best, "unknown" in record.reasons) == (response["classes"][0]["label"], True)


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
    names = {f"{hashlib.sha256(body).hexdigest()[:32]}.jpg" for body in (first, second, third)}
    assert {record.image for _, record in read_kept(tmp_path)} == names


class KeeperOfTests(Keeper):
    """A keeper without decoder processes, to which a test offers unknown photographs."""

    def __init__(self, bundle: Bundle, store: Callable[..., str], share=0.0) -> None:
        self.metrics, self._served = (
            Metrics(),
            SimpleNamespace(name="tiny", bundle=rejecting_all(bundle)),
        )
        folder = SimpleNamespace(
            add=store,
            clean_up=lambda: None,
            has_duplicate=lambda *_: False,
            clean_up_seconds=60,
        )
        super().__init__(folder, share, self.metrics, copy_without_metadata)  # type: ignore[arg-type]

    def take(self, *bodies: bytes) -> None:
        for body in bodies:
            pixels = np.random.default_rng([*body]).integers(0, 256, (32, 32, 3), np.uint8)
            prediction = Prediction({"logits": np.arange(7, dtype=np.float32)}, {}, pixels)
            self.offer(self._served, body, prediction)  # type: ignore[arg-type]

    def counts(self) -> dict[str, float]:
        """Work until the queue is empty; return the results that occurred."""
        self.start()
        self.stop()
        found = {
            name: self.metrics.kept_images.labels(name)._value.get()
            for name in get_args(KeptResult)
        }
        return {name: count for name, count in found.items() if count}


def test_a_full_queue_drops_and_counts(bundle, monkeypatch) -> None:
    keeper, bodies = KeeperOfTests(bundle, lambda *_: "kept"), photos(6)
    monkeypatch.setattr(keep, "MAX_QUEUED_PHOTOS", 3)
    keeper.take(*bodies[:5])
    monkeypatch.setattr(keep, "MAX_QUEUED_PHOTOS", 100)
    monkeypatch.setattr(keep, "MAX_QUEUED_PHOTO_BYTES", 3 * (len(bodies[0]) + 3072))
    keeper.take(bodies[5])
    assert keeper.counts() == {"kept": 3, "dropped": 3}


# the share of the sample, and what becomes of four photographs that come at once
TOO_FAST = {
    "others": (0.0, {"kept": 2, "dropped": 2}),
    "the sample": (1.0, {"kept": 4}),
}


@pytest.mark.parametrize(("share", "expected"), TOO_FAST.values(), ids=TOO_FAST)
def test_only_the_sample_is_kept_however_fast_photographs_come(
    bundle, monkeypatch, share: float, expected: dict[str, int]
) -> None:
    monkeypatch.setattr(keep, "PAUSE", 3600.0)
    monkeypatch.setattr(keep, "BURST", 3600.0)
    keeper = KeeperOfTests(bundle, lambda *_: "kept", share)
    keeper.take(*photos(4))
    assert keeper.counts() == expected


def test_a_damaged_file_and_a_bug_do_not_end_keeping(bundle, caplog) -> None:
    good, bug, last = photos(3)

    def store(image: bytes, _: KeptRecord) -> str:
        if image == copy_without_metadata(bug)[0]:
            raise RuntimeError("bug")
        return "kept"

    keeper = KeeperOfTests(bundle, store)
    keeper.take(b"no image", good, bug, last)
    assert keeper.counts() == {"kept": 2, "dropped": 1, "failed": 1}
    assert "is not kept" in caplog.text


STEPS = ("chmod", "write_bytes", "replace", "unlink")  # of `Path`
PHOTO = b"x" * FILE_BLOCK  # one block, and one for its record
PAIR = 2 * FILE_BLOCK


def photo(number: int, *reasons: str, **changes: object) -> KeptRecord:
    """A record of today whose hash differs from those of other numbers below 16."""
    name, near_hash = f"{number:032x}", f"{number:x}" * 16
    given = {
        "time": datetime.now(UTC),
        "reasons": reasons or ("low_margin",),
        "near_hash": near_hash,
    }
    return record_of(name, **given | changes)


def numbers(folder: Path) -> list[int]:
    return sorted(int(path.stem, 16) for path, _ in read_kept(folder))


def size_of(folder: Path) -> int:
    blocks = (-(-file.stat().st_size // FILE_BLOCK) for file in folder.iterdir())
    return sum(blocks) * FILE_BLOCK


# Reasons of the photographs in the order in which they arrive, and which of them remain of room
# for three.
EVICTIONS = {
    "oldest first": ([["unknown"]] * 5, [2, 3, 4]),
    "a small sample stays": ([["sample"], *[["unknown"]] * 5], [0, 4, 5]),
    "a large sample makes room": (
        [["sample"], ["sample"], ["unknown"], ["unknown"]],
        [1, 2, 3],
    ),
}


@pytest.mark.parametrize(("arriving", "remaining"), EVICTIONS.values(), ids=EVICTIONS)
def test_the_oldest_makes_room(tmp_path: Path, arriving, remaining) -> None:
    kept = KeptFolder(tmp_path, 3 * PAIR, 30)
    for number, reasons in enumerate(arriving):
        assert kept.add(PHOTO, photo(number, *reasons)) == "kept"
    assert numbers(tmp_path) == remaining


def test_the_limit_holds_before_and_after_every_step(tmp_path: Path, monkeypatch) -> None:
    limit, sizes = 3 * PAIR + FILE_BLOCK, []

    def checked(
        original: Callable[..., object], path: Path, *values: object, **options: object
    ) -> object:
        result = original(path, *values, **options)
        sizes.append(size_of(tmp_path))
        return result

    for name in STEPS:
        monkeypatch.setattr(Path, name, partialmethod(partial(checked, getattr(Path, name))))
    kept = KeptFolder(tmp_path, limit, 30)
    for number in range(16):
        image = PHOTO * (1 + number % 3)
        kept.add(image, photo(number, "sample" if number % 4 else "unknown"))
        assert kept.used == size_of(tmp_path)
    assert max(sizes) <= limit
    for number in (1, 15):  # the last one is kept, with other reasons
        assert (
            kept.add(PHOTO * 8, photo(number, "unknown")) == "dropped"
        )  # larger than the limit
    assert kept.used == size_of(tmp_path)
    assert 15 in numbers(tmp_path)


def test_near_duplicates_are_skipped_but_for_the_sample_and_copies_add_reasons(
    tmp_path: Path,
) -> None:
    kept = KeptFolder(tmp_path, 100 * PAIR, 30)
    near, far = "0" * 15 + "f", "0" * 14 + "1f"  # four and five bits
    assert kept.add(PHOTO, photo(0)) == "kept"
    assert kept.add(PHOTO, photo(1, near_hash=near)) == "near_duplicate"
    assert kept.add(PHOTO, photo(2, near_hash=far)) == "kept"
    assert kept.add(PHOTO, photo(3, "sample", near_hash=near)) == "kept"
    assert kept.add(PHOTO, photo(3, "sample", near_hash=near)) == "near_duplicate"
    assert (
        kept.add(PHOTO, photo(3, "sample", "unknown", bundle="new", near_hash=near)) == "kept"
    )
    assert numbers(tmp_path) == [0, 2, 3]
    record = {record.image: record for _, record in read_kept(tmp_path)}[f"{3:032x}.jpg"]
    assert (set(record.reasons), record.bundle, kept.used) == (
        {"sample", "unknown"},
        "new",
        3 * PAIR,
    )


def forget_one(folder: Path, number: int) -> None:
    forget(f"{number:032x}.jpg", [folder])


def label_one(folder: Path, number: int) -> None:
    LabelFolders(folder, folder.parent / "photos").label(f"{number:032x}", "cat")


@pytest.mark.parametrize("take_away", [forget_one, label_one])
def test_what_is_forgotten_or_labelled_beside_the_server_makes_place_for_others(
    tmp_path: Path, take_away: Callable[[Path, int], None]
) -> None:
    folder = tmp_path / "kept"
    kept = KeptFolder(folder, 100 * PAIR, 30)
    for number in range(3):
        kept.add(PHOTO, photo(number))
    take_away(folder, 0)
    assert kept.add(PHOTO, photo(9, near_hash="0" * 15 + "1")) == "kept"  # near the first one
    take_away(folder, 1)
    assert kept.add(PHOTO, photo(1, "unknown")) == "kept"  # the same one with another reason
    take_away(folder, 2)
    kept.clean_up()
    assert (kept.used, numbers(folder)) == (2 * PAIR, [1, 9])


def test_a_photograph_forgotten_while_its_record_is_replaced_leaves_none(
    tmp_path: Path, monkeypatch
) -> None:
    kept, write = KeptFolder(tmp_path, 100 * PAIR, 30), kept_folder._write
    kept.add(PHOTO, photo(0))

    def forget_before(file: Path, content: bytes) -> None:
        forget_one(tmp_path, 0)
        write(file, content)

    monkeypatch.setattr(kept_folder, "_write", forget_before)
    assert kept.add(PHOTO, photo(0, "unknown")) == "dropped"
    assert (kept.used, [file.name for file in tmp_path.iterdir()]) == (0, [".lock"])


def test_a_near_duplicate_of_a_forgotten_photograph_is_kept(
    bundle, onnx_runtime, tmp_path: Path
) -> None:
    (first,) = photos(1)
    settings = Settings(keep=tmp_path, keep_sample=0)
    with running(onnx_runtime, rejecting_all(bundle), settings) as client:
        client.post("/v1/classify", content=first)
        wait_for(lambda: results(client) == {"kept": 1})
        forget(str(read_kept(tmp_path)[0].path), [tmp_path])
        client.post("/v1/classify", content=first + b" ")  # other bytes, the same pixels
        wait_for(lambda: results(client) == {"kept": 2})


def set_clock(monkeypatch: pytest.MonkeyPatch, days: float) -> None:
    """Let a folder read a date that is so many *days* ahead."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) + timedelta(days=days)

    monkeypatch.setattr(kept_folder, "datetime", Clock)


def test_photographs_expire_by_the_times_of_their_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deleted: list[str] = []
    kept = KeptFolder(tmp_path, 100 * PAIR, 30, deleted.append)
    for number in range(3):
        taken_at = datetime.now(UTC) - timedelta(days=10 * (2 - number))
        kept.add(PHOTO, photo(number, time=taken_at))
    kept.clean_up()
    assert numbers(tmp_path) == [0, 1, 2]

    set_clock(monkeypatch, 11)
    kept.clean_up()
    assert (numbers(tmp_path), deleted) == ([1, 2], ["expired"])

    # A shorter time holds for those that are there.
    del kept
    gc.collect()
    KeptFolder(tmp_path, 100 * PAIR, 15)
    assert numbers(tmp_path) == [2]


@pytest.mark.parametrize(("step", "remaining"), [("unlink", [0]), ("exists", [])])
def test_a_file_that_cannot_be_deleted_or_found_keeps_no_other_photograph(
    tmp_path: Path, monkeypatch, step: str, remaining: list[int]
) -> None:
    def refuse(
        original: Callable[..., object], path: Path, *values: object, **options: object
    ) -> object:
        if path.name.startswith(f"{0:032x}"):
            raise OSError(errno.EIO, "no")
        return original(path, *values, **options)

    kept = KeptFolder(tmp_path, 100 * PAIR, 1)
    for number in range(3):
        kept.add(PHOTO, photo(number))
    monkeypatch.setattr(Path, step, partialmethod(partial(refuse, getattr(Path, step))))
    set_clock(monkeypatch, 2)
    with pytest.raises(OSError, match="no"):
        kept.clean_up()
    assert numbers(tmp_path) == remaining


@pytest.mark.file_times
def test_photographs_expire_while_nothing_is_sent(bundle, onnx_runtime, tmp_path: Path) -> None:
    settings = Settings(keep=tmp_path, keep_sample=1, keep_days=0.5 / 86_400)
    with running(onnx_runtime, bundle, settings) as client:
        client.post("/v1/classify", content=photos(1)[0])
        wait_for(lambda: results(client) == {"kept": 1})
        wait_for(
            lambda: 'kept_deleted_total{reason="expired"} 1.0' in client.get("/metrics").text
        )
    assert numbers(tmp_path) == []


def test_a_new_reason_that_cannot_be_written_keeps_the_photograph(
    tmp_path: Path, monkeypatch
) -> None:
    kept = KeptFolder(tmp_path, 100 * PAIR, 30)
    kept.add(PHOTO, photo(0, "sample"))

    with monkeypatch.context() as patch:
        patch.setattr(
            kept_folder,
            "atomic_write",
            lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")),
        )
        assert kept.add(PHOTO, photo(0, "unknown")) == "failed"

    assert numbers(tmp_path) == [0]
    assert kept.add(PHOTO, photo(0, "unknown")) == "kept"

    ((_, record),) = read_kept(tmp_path)
    assert set(record.reasons) == {"sample", "unknown"}


def test_a_start_counts_what_exists_and_deletes_only_what_is_incomplete(tmp_path: Path) -> None:
    kept = KeptFolder(tmp_path, 100 * PAIR, 30)
    for number in range(4):
        kept.add(PHOTO, photo(number))
    del kept
    gc.collect()
    own = [
        f"{9:032x}.png.0123abcd.partial",
        f"{1:032x}.json.89abcdef.partial",
        f"{10:032x}.json",
        ".ages",  # of 0.2.0
    ]
    later = [f"{11:032x}.jpg", f"{11:032x}.json"]  # a record of a later version
    foreign = [
        f"{8:032x}.jpg",
        "photo.jpg",
        "notes.json",
        "x.partial",
        f"{7:032x}.gif",
        f"{7:031x}.jpg",
        *later,
    ]
    for name in (*own, *foreign):
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "folder").mkdir()
    kept = KeptFolder(tmp_path, 3 * PAIR, 30)
    names = {file.name for file in tmp_path.iterdir()}
    assert not names.intersection(own)
    assert names.issuperset(foreign)
    assert numbers(tmp_path) == [1, 2, 3]
    kept.add(PHOTO, photo(4))
    assert numbers(tmp_path) == [2, 3, 4]


def test_a_folder_has_one_writer_and_one_reader_and_other_files_stay(tmp_path: Path) -> None:
    folder, mask = tmp_path / "new" / "kept", os.umask(0)
    try:
        first = KeptFolder(folder, 2 * PAIR, 30)
        assert first.add(PHOTO, photo(0)) == "kept"
    finally:
        os.umask(mask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
    with pytest.raises(
        ConfigError, match="another process keeps photos there; name another folder"
    ):
        KeptFolder(folder, PAIR, 30)
    (tmp_path / "film.mov").write_bytes(PHOTO * 4)
    with pytest.raises(StorageError, match="cannot be written"):
        KeptFolder(tmp_path / "film.mov" / "kept", PAIR, 30)


@pytest.mark.file_times
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_full_disk_stops_keeping_with_one_warning_until_it_works_again(
    tmp_path: Path, monkeypatch, caplog, code
) -> None:
    kept = KeptFolder(tmp_path, 100 * PAIR, 30)
    kept.add(PHOTO, photo(0))
    tried = []

    def fail(path: Path, content: bytes) -> None:
        tried.append(path)
        with path.open("wb") as file:
            file.write(content[:100])
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as full, caplog.at_level(logging.WARNING, "sopdeploy.keep"):
        full.setattr(Path, "write_bytes", fail)
        assert [kept.add(PHOTO, photo(number)) for number in (1, 2)] == ["failed", "failed"]
        assert len(tried) == 2
        assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert (numbers(tmp_path), len(list(tmp_path.glob("*"))), kept.used) == ([0], 3, PAIR)
    assert kept.add(PHOTO, photo(4)) == "kept"
    assert numbers(tmp_path) == [0, 4]


def kill_at(last: int) -> None:
    """Kill this process at its step number *last* on a file; a step that writes a file writes half of it."""
    steps = itertools.count(1)

    def stop(
        name: str, original: Callable[..., object], path: Path, *values: bytes, **given: object
    ) -> object:
        if next(steps) == last:
            if name == "write_bytes":
                original(path, values[0][: len(values[0]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, *values, **given)

    for name in STEPS:
        setattr(Path, name, partialmethod(partial(stop, name, getattr(Path, name))))


@pytest.mark.slow
def test_a_process_killed_at_any_step_leaves_no_half_photograph(tmp_path: Path) -> None:
    """It adds a second photograph, for which the first one makes room, and a reason to it."""
    limit, bodies = 20_000, {1: b"1" * 7000, 2: b"2" * 7000}
    KeptFolder(tmp_path / "start", limit, 30).add(bodies[1], photo(1))

    def add(folder: Path, last: int) -> None:
        kill_at(last)
        kept = KeptFolder(folder, limit, 30)
        kept.add(bodies[2], photo(2))
        kept.add(bodies[2], photo(2, "unknown"))

    for last in range(1, 100):
        folder = shutil.copytree(tmp_path / "start", tmp_path / str(last))
        killed = kills_itself(partial(add, folder, last))
        for path, record in read_kept(folder):
            assert (path.name, path.read_bytes()) == (
                record.image,
                bodies[int(path.stem, 16)],
            ), last
        kept = KeptFolder(folder, limit, 30)
        files = [file for file in folder.iterdir() if file.name != ".lock"]
        assert (len(files), kept.used <= limit) == (2 * len(read_kept(folder)), True), last
        if not killed:
            break
    assert 12 < last < 99  # steps


def test_a_reported_image_is_kept_with_its_suggestion_also_if_it_was_kept_before(
    tmp_path, bundle, onnx_runtime
):
    low, sure = photos(2)
    labels = bundle.labels
    with running(onnx_runtime, bundle, Settings(keep=tmp_path, keep_sample=1.0)) as client:
        assert client.get("/info").json()["keeps"] is True
        wrong = client.post("/v1/classify?reported=a%00b", content=low)
        assert (wrong.status_code, wrong.json()["code"]) == (400, "malformed_request")
        explained = client.post(f"/v1/classify?reported={labels[0]}&explain=true", content=low)
        assert (explained.status_code, explained.json()["code"]) == (400, "malformed_request")
        for query in ("", "?reported=a new class", "?reported="):
            assert client.post(f"/v1/classify{query}", content=low).status_code == 200
        assert client.post("/v1/classify?reported=", content=sure).status_code == 200
        wait_for(lambda: sum(results(client).values()) == 4)
    kept = {path.stem: record for path, record in read_kept(tmp_path)}
    first, second = (kept[hashlib.sha256(image).hexdigest()[:32]] for image in (low, sure))
    assert {"sample", "reported"} <= {*first.reasons}
    assert first.suggested == "a new class"
    assert "reported" in second.reasons
    assert second.suggested is None
    assert '"suggested"' not in second.model_dump_json()  # earlier versions read it


def test_the_suggestion_of_a_person_stays_when_another_reason_is_added(tmp_path):
    folder, image = KeptFolder(tmp_path, 1_000_000, 1.0), photos(1)[0]
    name = hashlib.sha256(image).hexdigest()[:32]
    reported = record_of(name, reasons=("reported",), suggested="hat")
    for record in (reported, record_of(name, reasons=("sample",))):
        assert folder.add(image, record) == "kept"
    ((_, record),) = read_kept(tmp_path)
    assert (record.reasons, record.suggested) == (("reported", "sample"), "hat")
