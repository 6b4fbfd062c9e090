"""The drift of a model: blocks of its answers, across restarts and other bundles, in `/metrics`."""

import asyncio
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sopdeploy.decision import Decision, Rejection
from sopdeploy.evaluation import watch
from sopdeploy.evaluation.drift import Answers
from sopdeploy_service.inference import drift
from sopdeploy_service.inference.drift import BLOCK, Block, DriftMonitor, ModelTraffic
from sopdeploy_service.inference.drift_state import TRAFFIC, read_alarms
from sopdeploy_service.inference.results import Prediction
from sopdeploy_service.observability.metrics import Metrics
from tests.support.pictures import encoded
from tests.support.service import wait_for

SIDE = 16


@pytest.fixture(autouse=True)
def _small(monkeypatch) -> None:
    monkeypatch.setattr(drift, "BLOCK_SECONDS", 0.0)


def model(version: str = "one", classes: int = 3, threshold: float = -10.0) -> Any:
    labels = [str(number) for number in range(classes)]
    rules = Decision(rejection=Rejection(threshold=threshold))
    bundle = SimpleNamespace(manifest=SimpleNamespace(rules=rules))
    return SimpleNamespace(
        name="tiny", version=version, labels=labels, logits_name="logits", bundle=bundle
    )


class Site:
    """A monitor in an event loop of its own, and answers for it."""

    def __init__(self, folder: Path | None = None) -> None:
        self.ran: list[tuple[str, Any]] = []
        self.level = 0.0  # mean of the logits of a new bundle for the images of the reference

        async def run(served: Any, pixels: np.ndarray) -> np.ndarray:
            self.ran.append((served.version, pixels))
            size = len(served.labels)
            return (
                np.random.default_rng(len(self.ran))
                .normal(self.level, size=size)
                .astype(np.float32)
            )

        self.metrics = Metrics()
        self.monitor = DriftMonitor(self.metrics, run)
        if folder is not None:
            self.monitor.keep_in(folder, 1.0)

    def send(
        self,
        blocks: int,
        served: Any = None,
        *,
        light: int = 60,
        seed: int = 0,
        fall: float = 0.0,
    ) -> None:
        """Offer so many *blocks* of answers about images with mean *light*, and wait for each.

        The logits *fall* by so much.
        """
        served = served or model()
        random = np.random.default_rng(seed)

        # After a restart, the first answer only begins to read the blocks.
        folder = self.monitor._folder
        is_first = served.name not in self.monitor._traffic
        reads = is_first and folder is not None and (folder / TRAFFIC / "tiny").is_dir()

        async def offer() -> None:
            for number in range(-reads, blocks * BLOCK):
                pixels = random.integers(0, 2 * light, (SIDE, SIDE, 3), np.uint8)
                logits = random.normal(size=len(served.labels)).astype(np.float32) - fall
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
    caplog.set_level("INFO", "sopdeploy.drift")
    site = Site()
    site.send(20)
    assert "compared for the first time after 200 images" in caplog.text
    assert site.sample("p_value", "image") is not None
    assert "drift since" not in caplog.text

    site.send(15, light=100, seed=1)
    assert site.sample("shift", "image") > 0.1
    assert site.sample("p_value", "image") < 0.002
    assert caplog.text.count("drift since") == 1
    assert "a camera, the light" in caplog.text


def test_an_alarm_comes_within_two_hundred_images_and_names_the_share_that_is_rejected(
    caplog,
) -> None:
    """All images are accepted before; then the logits fall below the threshold."""
    site = Site()
    site.send(12, model(threshold=0.0))
    assert not site.traffic.watch.is_alarm
    site.send(8, model(threshold=0.0), seed=1, fall=5.0)
    assert site.traffic.watch.is_alarm
    assert re.search(r"rejected \d\d % of the images, before \d %", caplog.text)


def test_an_alarm_outlives_a_new_bundle_that_is_as_unsure_and_a_restart(
    tmp_path, caplog
) -> None:
    site = Site(tmp_path)
    site.send(12, model(threshold=0.0))
    site.send(8, model(threshold=0.0), seed=1, fall=5.0)
    [since] = read_alarms(tmp_path).values()

    # The new bundle accepts the images of the reference, and rejects the newest ones.
    site.level = 3.0
    site.send(12, model("two", threshold=0.0), seed=2, fall=5.0)
    assert site.traffic.watch.is_alarm
    assert caplog.text.count("the new bundle does not end the drift") == 1

    again = Site(tmp_path)
    again.send(1, model("two", threshold=0.0), seed=3, fall=5.0)
    assert again.traffic.watch.is_alarm
    assert list(read_alarms(tmp_path).values()) == [since]


def test_an_alarm_ends_with_a_bundle_that_has_learned_the_change(tmp_path, caplog) -> None:
    """The images stay darker, which is the world's and no alarm any more."""
    caplog.set_level("INFO", "sopdeploy.drift")
    site = Site(tmp_path)
    site.send(12)
    site.send(8, seed=1, light=100, fall=5.0)
    assert site.traffic.watch.is_alarm

    site.send(1 + watch.END_BLOCKS, model("two"), seed=2, light=100)
    assert not site.traffic.watch.is_alarm
    assert "no drift any more" in caplog.text
    assert not read_alarms(tmp_path)
    site.send(8, model("two"), seed=3, light=100)
    assert not site.traffic.watch.is_alarm


def test_no_image_is_kept_without_a_folder_and_photographs_are_compared_across_bundles(
    tmp_path,
) -> None:
    site = Site()
    site.send(12)
    site.send(11, model("two"), light=100)  # one more: the first answer is that of the change
    assert site.traffic.version == "two"
    assert not site.ran
    assert list(site.traffic.comparisons) == ["image"]
    assert site.traffic.comparisons["image"].is_alarm


def test_blocks_survive_a_restart_and_only_their_owner_can_read_them(tmp_path) -> None:
    site = Site(tmp_path)
    site.send(12)
    files = sorted((tmp_path / TRAFFIC / "tiny").glob("*.npz"))
    assert len(files) == 12
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}

    again = Site(tmp_path)
    again.send(1, seed=1)
    assert len(again.traffic.watch.reference) == len(site.traffic.watch.reference) + 1
    assert len(again.traffic.blocks) == 13
    first, last = again.traffic.watch.reference[0], again.traffic.watch.window[-1]
    np.testing.assert_array_equal(
        first.answers.image, site.traffic.watch.reference[0].answers.image
    )
    assert last.path == files[-1].with_name("00000012.npz")


def test_blocks_of_an_earlier_version_are_divided_by_their_age(tmp_path) -> None:
    """They have no state, no time and no share of rejected images."""
    Site(tmp_path).send(12)
    folder = tmp_path / TRAFFIC / "tiny"
    (folder / "state.json").unlink()
    for path in folder.glob("*.npz"):
        with np.load(path) as arrays:
            old = {name: arrays[name] for name in arrays if name not in {"time", "unknown"}}
        np.savez(path, are_worth=np.zeros(BLOCK, np.bool_), **old)

    again = Site(tmp_path)
    again.send(1, seed=1)
    assert not again.traffic.blocks[0].answers.has_unknown
    assert len(again.traffic.blocks) == 13


def test_a_new_bundle_runs_on_the_images_of_the_reference(tmp_path) -> None:
    site = Site(tmp_path)
    site.send(14)
    reference = site.traffic.watch.reference
    site.send(1, model("two", classes=4), seed=1)
    assert {version for version, _ in site.ran} == {"two"}
    assert len(site.ran) == len(reference) * BLOCK
    assert len(site.traffic.watch.reference) == len(reference)
    assert {block.version for block in site.traffic.watch.reference} == {"two"}

    # Also after a restart, and only what is needed remains.
    again = Site(tmp_path)
    again.send(1, model("two", classes=4), seed=2)
    assert not again.ran
    assert {block.version for block in again.traffic.blocks} == {"two"}
    paths = {block.path for block in again.traffic.blocks}
    assert set((tmp_path / TRAFFIC / "tiny").glob("*.npz")) == paths


def test_an_alarm_keeps_its_reference_if_few_of_its_images_remain(tmp_path) -> None:
    site = Site(tmp_path)
    site.send(12)
    site.send(8, seed=1, light=100, fall=5.0)
    reference = site.traffic.watch.reference
    for block in reference[watch.NEWEST_BLOCKS - 1 :]:
        block.path.unlink()

    site.send(1, model("two"), seed=2, light=100)
    assert site.traffic.watch.is_alarm
    assert site.traffic.watch.reference == reference


def test_an_alarm_ends_at_a_restart_without_enough_of_its_reference(tmp_path) -> None:
    site = Site(tmp_path)
    site.send(12)
    site.send(8, seed=1, light=100, fall=5.0)
    assert read_alarms(tmp_path)
    for block in site.traffic.watch.reference[watch.NEWEST_BLOCKS - 2 :]:
        block.path.unlink()

    again = Site(tmp_path)
    again.send(1, seed=2, light=100)
    assert not again.traffic.watch.is_alarm
    assert not read_alarms(tmp_path)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "no archive": lambda path: path.write_bytes(b"x" * 100),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-200]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_block_is_skipped_with_a_warning(tmp_path, damage, caplog) -> None:
    Site(tmp_path).send(3)
    DAMAGES[damage](sorted((tmp_path / TRAFFIC / "tiny").iterdir())[1])
    again = Site(tmp_path)
    again.send(1, seed=1)
    assert len(again.traffic.blocks) == 3
    assert "00000001.npz: is not read" in caplog.text


def test_a_folder_that_cannot_be_written_costs_no_answer(tmp_path, caplog) -> None:
    (tmp_path / TRAFFIC).write_text("")
    site = Site(tmp_path)
    site.send(2)
    assert len(site.traffic.blocks) == 2
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


def test_no_answer_of_the_bundle_before_stays_in_the_window() -> None:
    site = Site()
    site.send(watch.NEWEST_BLOCKS + 2)
    assert site.traffic.watch.window
    site.send(1, model("two"), seed=1)
    assert {block.version for block in site.traffic.watch.window} <= {"two"}


def test_a_block_that_is_in_no_comparison_any_more_is_deleted(tmp_path) -> None:
    site = Site(tmp_path)
    count = 2 * watch.NUM_BLOCKS + 3
    site.send(count)
    files = {*(tmp_path / TRAFFIC).glob("*/*.npz")}
    assert files == {block.path for block in site.traffic.blocks}
    assert len(files) < count


def test_blocks_that_are_too_old_are_deleted(tmp_path) -> None:
    Site(tmp_path).send(3)
    again = Site()
    again.monitor.keep_in(tmp_path, -1.0)
    again.send(1)
    assert len(again.traffic.blocks) == 1


def test_a_server_counts_what_it_classifies_but_no_report(
    serve_with, onnx_runtime, jpeg, tmp_path
) -> None:
    client = serve_with(onnx_runtime, keep=tmp_path)
    other = encoded(Image.new("RGB", (40, 40), (200, 30, 60)), "JPEG")

    def send(image: bytes, query: str = "") -> None:
        for _ in range(BLOCK // 5):
            reply = client.post(f"/v1/classify{query}", files=[("image", ("x.jpg", image))] * 5)
            assert reply.status_code == 200

    def blocks() -> list[Path]:
        return sorted((tmp_path / TRAFFIC).glob("*/*.npz"))

    send(jpeg)
    wait_for(blocks)
    wait_for(lambda: re.search(r'drift_images{model="\w+"} 25.0', client.get("/metrics").text))

    # The next block is complete with as many images that nobody reports.
    send(other, "?reported=")
    send(jpeg)
    wait_for(lambda: len(blocks()) == 2)
    first, second = (drift.read_block(path).identities.tolist() for path in blocks())
    assert first == second
    assert len({*first}) == 1


def test_of_a_reference_of_a_bundle_with_more_classes_only_the_images_are_compared() -> None:
    def blocks(version: str, num_classes: int, count: int) -> list[Block]:
        logits_NC = np.eye(num_classes, dtype=np.float32)[np.arange(BLOCK) % num_classes]
        answers = Answers.of(logits_NC, np.zeros((BLOCK, 2), np.float32))
        return [Block(version, answers, np.full(BLOCK, ""), 0.0)] * count

    traffic: Any = SimpleNamespace(version="new", num_classes=5)
    compared = drift.compare_blocks(traffic, blocks("old", 6, 12), blocks("new", 5, 4))
    assert {*compared} == {"image"}
