"""Vectors of photographs of other things are those of the network of a run, or there are none."""

import numpy as np
import pytest
import torch

from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.second_order_head import SecondOrderHead
from sopdeploy.training.few_shot.default_network import open_default_network
from sopdeploy.training.few_shot.other_things import read_other_things, store_vectors
from sopdeploy.training.start_weights import StartReport
from sopdeploy.weights.published import PACKAGES

DEFAULT = Preprocess(interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
SHA256 = PACKAGES["timm/tf_efficientnet_lite0.in1k"].sha256


def weights_of(sha256: str) -> StartReport:
    return StartReport(
        file="weights.pth",
        sha256=sha256,
        network="EfficientNet-Lite",
        loaded=294,
        new=(),
        unused=(),
        preprocess=DEFAULT,
    )


@pytest.fixture(scope="module")
def network() -> SecondOrderHead:
    return open_default_network().network


@pytest.mark.parametrize("decoding", ["full", "fast"])
def test_the_default_network_has_a_hundred_vectors(network, decoding):
    preprocess = DEFAULT.model_copy(update={"decoding": decoding})

    vectors = read_other_things(network, weights_of(SHA256), preprocess)

    assert vectors is not None
    assert vectors.shape == (100, 1280)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-6)
    stored = store_vectors(vectors)
    assert stored.dtype == np.int8
    assert np.abs(stored).max(axis=1).tolist() == [127] * 100


def test_other_weights_and_other_pixels_have_none(network):
    smaller = DEFAULT.model_copy(update={"crop": 160})

    assert read_other_things(network, weights_of(SHA256), smaller) is None
    assert read_other_things(network, weights_of("0" * 64), DEFAULT) is None
    assert read_other_things(network, None, DEFAULT) is None


@pytest.mark.parametrize(
    "pool",
    [
        pytest.param(lambda own: own.sqrt(), id="another pooling of as many values"),
        pytest.param(lambda own: torch.cat([own, own], dim=1), id="more values"),
    ],
)
def test_the_same_weights_with_another_pooling_have_none(network, monkeypatch, pool):
    average = network.head_inputs

    def with_another_pooling(images):
        own, maps = average(images)
        return pool(own), maps

    monkeypatch.setattr(network, "head_inputs", with_another_pooling)
    assert read_other_things(network, weights_of(SHA256), DEFAULT) is None
