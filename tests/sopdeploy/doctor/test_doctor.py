"""Arithmetic and diagnosis of the doctor, without a server."""

import io
import re
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from sopdeploy.doctor import LoadStep, Scrape, judge, load_images, measure_server, parse_metrics
from sopdeploy.errors import ServiceError

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
        "concurrency": 8, "seconds": 1.0, "answered": 100, "rate": 100.0, "p50_ms": 10,
        "p99_ms": 30, "refused": {}, "num_runtimes": 1, "num_processes": 1,
        "runtime_busy": 0.3, "decoder_busy": 0.3,
        "num_decoders": 2, "client_busy": 0.3, "mean_batch": 2.0, "elsewhere_ms": 1.0,
        "stage_ms": {"receive": 1.0, "decode": 3.0, "queue": 3.0, "infer": 5.0},
    }  # fmt: skip
    return LoadStep(**{**facts, **changes})


def test_a_measurement_is_the_difference_of_two_scrapes() -> None:
    latencies, refused = [0.010] * 90 + [0.110] * 10, {"queue_full": 25}
    before, after = scrape(BEFORE, 100.0), scrape(AFTER, 104.0)
    found = measure_server(before, after, latencies, refused, concurrency=8, client_seconds=0.4)
    assert (found.rate, found.runtime_busy, found.decoder_busy, found.client_busy) == (25.0, 0.5, 0.375, 0.1)
    assert found.mean_batch == 4.0
    assert found.stage_ms["infer"] == pytest.approx(200)
    assert found.stage_ms["decode"] == pytest.approx(100)
    assert found.stage_ms["receive"] == 0
    assert (found.p50_ms, found.p99_ms) == (10, 110)
    assert found.refused_share == pytest.approx(0.2)
    restarted = measure_server(after, scrape(BEFORE, 105.0), [], {}, concurrency=1, client_seconds=0.0)
    assert (restarted.rate, restarted.p99_ms, restarted.mean_batch, restarted.elsewhere_ms) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("names", "runtimes", "busy"), [(("0", "1"), 2, 0.5), (("default:0", "default:1"), 1, 1.0)]
)
def test_each_device_has_an_engine_and_front_ends_share_it(
    names: tuple[str, str], runtimes: int, busy: float
) -> None:
    def labelled(text: str, name: str) -> str:
        return re.sub(r"(?m)^(\w+)(?:\{(.*)\})? ", rf'\1{{process="{name}",\2}} ', text)

    before, after = ("\n".join(labelled(text, name) for name in names) for text in (BEFORE, AFTER))
    found = measure_server(
        scrape(before, 100.0), scrape(after, 104.0), [0.01] * 200, {}, concurrency=8, client_seconds=0.4
    )
    assert (found.num_runtimes, found.num_processes, found.num_decoders) == (runtimes, 2, 4)
    assert (found.runtime_busy, found.decoder_busy) == (busy, 0.375)


@pytest.mark.parametrize("text", ["python_info 1.0", 'a{b="c'])
def test_metrics_of_other_servers_are_rejected(text: str) -> None:
    with pytest.raises(ServiceError, match="not from a sopdeploy server"):
        parse_metrics(text)


@pytest.mark.parametrize(
    ("changes", "limit", "change"),
    [
        ({"runtime_busy": 0.97}, "runtime", "a larger --max-batch"),
        ({"decoder_busy": 0.95, "runtime_busy": 0.5}, "decode", "--setting decoders=4"),
        ({"refused": {"queue_full": 9}}, "queue", "--queue-size 64"),
        ({"client_busy": 0.97}, "client", "run doctor on a faster machine"),
        ({"elsewhere_ms": 50.0}, "network", "smaller files"),
        ({}, "load", "--concurrency 16"),
    ],
)
def test_each_bottleneck_has_its_advice(changes: dict[str, Any], limit: str, change: str) -> None:
    best = step(**changes)
    found = judge(best, [best])
    assert found.limit == limit
    assert change in found.change
    assert found.gain


def test_generated_images_are_different_jpegs() -> None:
    found = load_images(None)
    assert len(set(found)) == len(found) > 1
    assert {Image.open(io.BytesIO(body)).size for body in found} == {(640, 480)}
