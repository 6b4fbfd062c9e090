"""The drift of a model: blocks of its answers, across restarts and other bundles, in `/metrics`."""

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sopdeploy_service.inference import drift
from sopdeploy_service.inference.drift import BLOCK, DriftMonitor, ModelTraffic, find_labelled
from sopdeploy_service.inference.results import Prediction
from sopdeploy_service.observability.metrics import Metrics
from tests.support.service import wait_for

SIDE = 16


@pytest.fixture(autouse=True)
def _small(monkeypatch) -> None:
    for name, value in {
        "BLOCK_SECONDS": 0.0,
        "NUM_BLOCKS": 10,
        "TEST_BLOCKS": 5,
        "MIN_BLOCKS": 4,
    }.items():
        monkeypatch.setattr(drift, name, value)


def model(version: str = "one", classes: int = 3) -> Any:
    labels = [str(number) for number in range(classes)]
    return SimpleNamespace(name="tiny", version=version, labels=labels, logits_name="logits")


class Site:
    """A monitor in an event loop of its own, and answers for it."""

    def __init__(
        self, folder: Path | None = None, ran: Callable[..., Any] | None = None
    ) -> None:
        self.ran: list[tuple[str, Any]] = []

        async def run(served: Any, pixels: np.ndarray) -> np.ndarray:
            self.ran.append((served.version, pixels))
            return np.zeros(len(served.labels), np.float32) if ran is None else ran(pixels)

        self.metrics = Metrics()
        self.monitor = DriftMonitor(self.metrics, run)
        if folder is not None:
            self.monitor.keep_in(folder, 1.0, lambda _model, logits, _hash: bool(logits[0] > 2))

    def send(self, blocks: int, served: Any = None, *, light: int = 60, seed: int = 0) -> None:
        """Offer so many *blocks* of answers about images with mean *light*, and wait for each."""
        served = served or model()
        random = np.random.default_rng(seed)

        # After a restart, the first answer only begins to read the blocks.
        folder = self.monitor._folder
        is_first = served.name not in self.monitor._traffic
        reads = is_first and folder is not None and (folder / drift.TRAFFIC / "tiny").is_dir()

        async def offer() -> None:
            for number in range(-reads, blocks * BLOCK):
                pixels = random.integers(0, 2 * light, (SIDE, SIDE, 3), np.uint8)
                logits = random.normal(size=len(served.labels)).astype(np.float32)
                prediction = Prediction({"logits": logits}, {}, pixels, ())
                self.monitor.offer(served, f"{seed}-{number}".encode(), prediction)
                await asyncio.gather(*self.monitor._tasks)

        asyncio.run(offer())

    @property
    def traffic(self) -> ModelTraffic:
        return self.monitor._traffic["tiny"]

    def sample(self, name: str, of: str) -> float | None:
        labels = {"model": "tiny", "of": of}
        return self.metrics.registry.get_sample_value(f"sopdeploy_drift_{name}", labels)


def test_a_window_is_compared_with_the_earlier_answers_and_an_alarm_is_logged_once(
    caplog,
) -> None:
    site = Site()
    site.send(20)
    assert site.sample("p_value", "image") is not None
    assert "drift" not in caplog.text
    site.send(15, light=100, seed=1)
    assert site.sample("shift", "image") > 0.1
    assert site.sample("p_value", "image") < 0.0025
    assert caplog.text.count("drift in the last") == 1
    assert "a camera, the light" in caplog.text


def test_no_image_is_kept_without_a_folder_and_photographs_are_compared_across_bundles(
    tmp_path,
) -> None:
    site = Site()
    site.send(10)
    site.send(11, model("two"), light=100)  # one more: the first answer is that of the change
    assert site.traffic.version == "two"
    assert not site.ran
    assert list(site.traffic.comparisons) == ["image"]
    assert site.traffic.comparisons["image"].is_alarm


@pytest.mark.file_times
def test_blocks_survive_a_restart_and_only_their_owner_can_read_them(tmp_path) -> None:
    site = Site(tmp_path)
    site.send(12)
    files = sorted((tmp_path / drift.TRAFFIC / "tiny").iterdir())
    assert len(files) == 12
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}

    again = Site(tmp_path)
    again.send(1, seed=1)
    assert len(again.traffic.reference) == 10
    assert len(again.traffic.window) == 3
    first, last = again.traffic.reference[0], again.traffic.window[-1]
    np.testing.assert_array_equal(first.answers.image, site.traffic.reference[0].answers.image)
    assert last.path == files[-1].with_name("00000012.npz")


@pytest.mark.file_times
def test_a_new_bundle_runs_on_the_newest_images_but_those_that_were_labelled(tmp_path) -> None:
    site = Site(tmp_path)
    site.send(14)
    worth = [block.are_worth.sum() for block in site.traffic.blocks[-10:]]
    assert sum(worth) > 0

    site.send(1, model("two", classes=4), seed=1)
    assert {version for version, _ in site.ran} == {"two"}
    left_out = 10 * BLOCK - len(site.ran)
    assert left_out >= sum(worth)  # near-duplicates, too
    assert len(site.traffic.reference) == len(site.ran) // BLOCK
    assert {block.version for block in site.traffic.reference} == {"two"}

    # Also after a restart, and only what is needed remains.
    again = Site(tmp_path)
    again.send(1, model("two", classes=4), seed=2)
    assert not again.ran
    versions = {block.version for block in again.traffic.blocks}
    assert versions == {"two"}
    paths = {block.path for block in again.traffic.blocks}
    assert set((tmp_path / drift.TRAFFIC / "tiny").iterdir()) == paths


def test_a_photograph_that_waits_for_its_label_was_not_trained_on(tmp_path) -> None:
    site = Site(tmp_path)
    site.send(1)
    block = site.traffic.reference[0]
    [left_out] = find_labelled([block], tmp_path)
    assert left_out[block.are_worth].all()
    for identity in block.identities:
        (tmp_path / f"{identity}.json").touch()
    [left_out] = find_labelled([block], tmp_path)
    assert not left_out.any()


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "no archive": lambda path: path.write_bytes(b"x" * 100),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-200]),
}


@pytest.mark.file_times
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_block_is_skipped_with_a_warning(tmp_path, damage, caplog) -> None:
    Site(tmp_path).send(3)
    DAMAGES[damage](sorted((tmp_path / drift.TRAFFIC / "tiny").iterdir())[1])
    again = Site(tmp_path)
    again.send(1, seed=1)
    assert len(again.traffic.reference) == 3
    assert "00000001.npz: is not read" in caplog.text


def test_a_folder_that_cannot_be_written_costs_no_answer(tmp_path, caplog) -> None:
    (tmp_path / drift.TRAFFIC).write_text("")
    site = Site(tmp_path)
    site.send(2)
    assert len(site.traffic.reference) == 2
    assert "cannot be written" in caplog.text


def test_a_model_that_is_not_served_any_more_has_no_metrics() -> None:
    site = Site()
    site.send(20)
    assert site.sample("p_value", "image") is not None
    site.monitor.keep_only(["other"])
    assert site.sample("p_value", "image") is None
    assert not site.monitor._traffic


def test_a_new_bundle_has_no_metrics_of_the_one_before() -> None:
    site = Site()
    site.send(20)
    assert site.sample("p_value", "image") is not None
    site.send(1, model("two"), seed=1)
    assert site.sample("p_value", "image") is None


def test_blocks_that_are_too_old_are_deleted(tmp_path) -> None:
    Site(tmp_path).send(3)
    again = Site()
    again.monitor.keep_in(tmp_path, -1.0, lambda *_: False)
    again.send(1)
    assert len(again.traffic.reference) == 1


@pytest.mark.file_times
def test_a_server_counts_what_it_classifies_but_no_report(
    serve_with, onnx_runtime, jpeg, tmp_path
) -> None:
    client = serve_with(onnx_runtime, keep=tmp_path)
    files = [("image", ("x.jpg", jpeg))] * 5
    for _ in range(5):
        assert client.post("/v1/classify", files=files).status_code == 200
    wait_for(lambda: list((tmp_path / drift.TRAFFIC).glob("*/*.npz")))
    [block] = (tmp_path / drift.TRAFFIC).glob("*/*.npz")
    assert len(drift.read_block(block).identities) == BLOCK
    assert re.search(r'drift_images{model="\w+"} 0.0', client.get("/metrics").text)
    for _ in range(5):
        client.post("/v1/classify?reported=", files=files)
    assert len(list((tmp_path / drift.TRAFFIC).glob("*/*.npz"))) == 1
