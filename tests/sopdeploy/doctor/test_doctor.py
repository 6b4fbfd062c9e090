"""Arithmetic and diagnosis of the doctor, without a server."""

import io
import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sopdeploy.doctor.advice import gain_of_larger_batches, judge
from sopdeploy.doctor.examine import is_local, load_images
from sopdeploy.doctor.measure import (
    Interval,
    LoadStep,
    Scrape,
    bare_ratio,
    measure,
    parse_metrics,
    percentile,
    ramp_to,
)
from sopdeploy.errors import DataError, ServiceError

BEFORE = """
sopdeploy_decoders 2.0
sopdeploy_decode_seconds_total 1.0
sopdeploy_stage_duration_seconds_sum{stage="infer"} 5.0
sopdeploy_stage_duration_seconds_count{stage="infer"} 10.0
sopdeploy_batch_size_sum{model="a"} 40.0
sopdeploy_batch_size_count{model="a"} 10.0
python_info 1.0
"""
AFTER = """
sopdeploy_decoders 2.0
sopdeploy_decode_seconds_total 4.0
sopdeploy_stage_duration_seconds_sum{stage="infer"} 7.0
sopdeploy_stage_duration_seconds_count{stage="infer"} 20.0
sopdeploy_stage_duration_seconds_sum{stage="decode"} 6.0
sopdeploy_stage_duration_seconds_count{stage="decode"} 60.0
sopdeploy_batch_size_sum{model="a"} 80.0
sopdeploy_batch_size_count{model="a"} 20.0
sopdeploy_batch_size_sum{model="b"} 20.0
sopdeploy_batch_size_count{model="b"} 5.0
"""


def scrape(text: str, moment: float) -> Scrape:
    return replace(parse_metrics(text), moment=moment)


def step(**changes: Any) -> LoadStep:
    facts: dict[str, Any] = {
        "concurrency": 8, "seconds": 1.0, "answered": 100, "rate": 100.0, "p50_ms": 10, "p95_ms": 20,
        "p99_ms": 30, "refused": {}, "engines": 1, "processes": 1, "engine_busy": 0.3, "decoder_busy": 0.3,
        "decoders": 2, "client_busy": 0.3, "batches": 50, "mean_batch": 2.0,
        "infer_ms_per_batch": 5.0, "elsewhere_ms": 1.0,
        "stage_ms": {"receive": 1.0, "decode": 3.0, "queue": 3.0, "infer": 5.0},
    }  # fmt: skip
    return LoadStep(**{**facts, **changes})


def test_a_measurement_is_the_difference_of_two_scrapes() -> None:
    latencies = [0.010] * 90 + [0.110] * 10
    interval = Interval(scrape(BEFORE, 100.0), scrape(AFTER, 104.0))
    found = measure(interval, latencies, {"queue_full": 25}, concurrency=8, client_seconds=0.4)
    assert (found.rate, found.engine_busy, found.decoder_busy, found.client_busy) == (25.0, 0.5, 0.375, 0.1)
    assert (found.batches, found.mean_batch) == (15, 4.0)
    assert found.infer_ms_per_batch == pytest.approx(200)
    assert found.stage_ms["decode"] == pytest.approx(100)
    assert found.stage_ms["receive"] == 0
    assert (found.p50_ms, found.p95_ms) == (10, 110)
    assert found.refused_share == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("names", "engines", "busy"), [(("0", "1"), 2, 0.5), (("default:0", "default:1"), 1, 1.0)]
)
def test_each_device_has_an_engine_and_front_ends_share_it(
    names: tuple[str, str], engines: int, busy: float
) -> None:
    def label(match: re.Match[str], name: str) -> str:
        others = f"{match[2]}," if match[2] else ""
        return f'{match[1]}{{{others}process="{name}"}} '

    pages = [
        "\n".join(re.sub(r"(?m)^(\w+)(?:\{(.*)\})? ", partial(label, name=name), text) for name in names)
        for text in (BEFORE, AFTER)
    ]
    interval = Interval(scrape(pages[0], 100.0), scrape(pages[1], 104.0))
    found = measure(interval, [0.01] * 200, {}, concurrency=8, client_seconds=0.4)
    assert (found.engines, found.processes, found.decoders) == (engines, 2, 4)
    assert (found.engine_busy, found.decoder_busy) == (busy, 0.375)
    assert bare_ratio(found, [found]) == pytest.approx(50 * 0.05 / engines)


def test_a_step_without_responses_is_zero_and_counters_never_decrease() -> None:
    found = measure(
        Interval(scrape(AFTER, 0.0), scrape(AFTER, 1.0)), [], {}, concurrency=1, client_seconds=0.0
    )
    assert (found.rate, found.p99_ms, found.mean_batch, found.elsewhere_ms) == (0, 0, 0, 0)
    assert Interval(scrape(AFTER, 0.0), scrape(BEFORE, 1.0)).increase("decode_seconds_total") == 0


@pytest.mark.parametrize("text", ["", "python_info 1.0", "<html>", 'a{b="c'])
def test_metrics_of_other_servers_are_rejected(text: str) -> None:
    with pytest.raises(ServiceError, match="not from a sopdeploy server"):
        parse_metrics(text)


@pytest.mark.parametrize(
    ("changes", "limit", "change"),
    [
        ({"engine_busy": 0.97}, "engine", "a faster engine"),
        (
            {"engine_busy": 0.97, "decoder_busy": 0.95, "refused": {"queue_full": 9}},
            "engine",
            "a faster engine",
        ),
        ({"decoder_busy": 0.95, "engine_busy": 0.5}, "decode", "--set decoders=4"),
        ({"refused": {"queue_full": 9}}, "queue", "--queue-size 64"),
        ({"client_busy": 0.97}, "client", "run doctor on a faster machine"),
        ({"elsewhere_ms": 50.0}, "network", "smaller files"),
        ({"refused": {"draining": 9}}, "load", "--concurrency 16"),
        ({}, "load", "--concurrency 16"),
    ],
)
def test_each_bottleneck_has_its_advice(changes: dict[str, Any], limit: str, change: str) -> None:
    best = step(**changes)
    found = judge(best, [best], largest_batch=8, cores=None)
    assert found.limit == limit
    assert change in found.change
    assert found.gain


def test_a_rate_that_does_not_grow_needs_cores_and_decoders_are_limited_by_engine_and_cores() -> None:
    best = step()
    found = judge(best, [best, step(concurrency=16, rate=90.0)], largest_batch=8, cores=None)
    assert (found.limit, "more processor cores" in found.change) == ("cores", True)
    best = step(decoder_busy=0.95, engine_busy=0.5)
    assert "+100%" in judge(best, [best], largest_batch=8, cores=None).gain
    three = judge(best, [best], largest_batch=8, cores=3)
    assert ("decoders=3" in three.change, "+50%" in three.gain) == (True, True)
    assert "smaller images" in judge(best, [best], largest_batch=8, cores=2).change
    idle = step(decoder_busy=0.95, engine_busy=0.0)
    assert "decoders=8" in judge(idle, [idle], largest_batch=8, cores=None).change
    front_ends = step(decoder_busy=0.95, engine_busy=0.5, decoders=8, processes=4)
    assert "decoders=4," in judge(front_ends, [front_ends], largest_batch=8, cores=None).change


def test_larger_batches_save_the_fixed_time_per_batch() -> None:
    steps = [step(mean_batch=n, infer_ms_per_batch=10 + 2 * n) for n in (1.0, 4.0)]
    assert gain_of_larger_batches(steps, 4) == pytest.approx((10 / 4 + 2) / (10 / 8 + 2) - 1)
    assert gain_of_larger_batches(steps[:1], 4) == 0
    flat = [step(mean_batch=n, infer_ms_per_batch=10) for n in (1.0, 4.0)]
    assert gain_of_larger_batches(flat, 4) == pytest.approx(1)
    best = step(engine_busy=0.99, mean_batch=4.0, infer_ms_per_batch=18)
    assert judge(best, steps, largest_batch=4, cores=None).change == "--max-batch 8"


def test_the_bare_engine_is_the_fastest_measured() -> None:
    steps = [step(rate=100, mean_batch=1, infer_ms_per_batch=5), step(mean_batch=4, infer_ms_per_batch=10)]
    assert bare_ratio(steps[0], steps) == pytest.approx(0.25)
    assert bare_ratio(step(mean_batch=0), [step(mean_batch=0)]) == 0


def test_clients_double_up_to_the_limit_and_percentiles_are_measured_values() -> None:
    ramps = {1: [1], 2: [1, 2], 5: [1, 2, 4, 5], 8: [1, 2, 4, 8]}
    assert {most: ramp_to(most) for most in ramps} == ramps
    assert (percentile([3, 1, 2], 0.5), percentile([3, 1, 2], 0.99), percentile([], 0.5)) == (2, 3, 0)


def test_loopback_addresses_are_local_and_generated_images_are_different_jpegs() -> None:
    assert all(map(is_local, ("http://127.0.0.1:80", "http://[::1]", "http://localhost")))
    assert not is_local("http://a.b")
    found = load_images(None)
    assert len(set(found)) == len(found) > 1
    assert {Image.open(io.BytesIO(body)).size for body in found} == {(640, 480)}


def test_images_of_a_folder_are_its_regular_files(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "cat.jpg").write_bytes(b"cat")
    assert load_images(tmp_path) == [b"cat"]
    with pytest.raises(DataError, match="contains no image"):
        load_images(tmp_path / "empty.jpg")
