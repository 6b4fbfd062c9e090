"""Embeddings from a network to HTTP: the input of the last linear layer, on request only."""

import base64

import numpy as np
import pytest
import torch
from torch import nn

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.manifest import EMBEDDING
from sopdeploy.bundle.probes import read_probes
from sopdeploy.client import Client
from sopdeploy.errors import LoweringError, ServiceError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import last_linear
from sopdeploy.models.registry import create_model
from sopdeploy_export.capture.deployed import Deployed, generated_images
from sopdeploy_export.last_layer import find_last_layer, fold_temperature
from sopdeploy_export.options import ExportOptions
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import Settings
from tests.export.conftest import export_once, trained
from tests.export.once import proving_once
from tests.export.user_network.networks import CLASSES, Small, export_small, variant
from tests.support.service import picture_bytes, running

SETTINGS = Settings(threads=1)


@pytest.mark.slow
def test_the_last_linear_layer_maps_the_embedding_to_the_logits(tmp_path):
    network = trained()
    exported = export_once(
        network, "dsop-resnet8", tmp_path, max_batch=1, with_features=True, precision="fp16"
    )

    assert [output.name for output in exported.manifest.outputs] == ["logits", EMBEDDING]

    expected = read_probes(open_bundle(exported.path)).expected
    with torch.no_grad():
        logits = network.logits_layer()(torch.from_numpy(expected[EMBEDDING]))

    assert np.abs(logits.numpy() - expected["logits"]).max() <= exported.parity.logits.tolerance


def test_logits_that_no_image_changes_are_refused_though_the_features_differ(tmp_path):
    network = trained()
    nn.init.zeros_(network.logits_layer().weight)
    with pytest.raises(LoweringError, match=r"same logits"):
        export_once(network, "dsop-resnet8", tmp_path, max_batch=1, with_features=True)


def test_a_temperature_changes_the_probabilities_of_a_head_and_not_the_cosine():
    torch.manual_seed(0)
    head = {"kind": "gap", "cosine": True}
    network = create_model("head:resnet8", num_classes=3, head=head).eval()
    network.pooled_head.means.copy_(torch.nn.functional.normalize(torch.rand(3, 64), dim=1))
    preprocess, images = Preprocess(resize=16, crop=16), generated_images(16)[:4]

    assert find_last_layer(network, preprocess, images, 3) is network.logits_layer()

    deployed = Deployed(network, preprocess)
    with torch.no_grad():
        before = deployed(torch.from_numpy(images))[0]
        fold_temperature(network, 2.0, preprocess, images, 3)
        after = deployed(torch.from_numpy(images))[0]

    torch.testing.assert_close((before / 2).softmax(dim=1), after.softmax(dim=1))
    torch.testing.assert_close(before.logsumexp(dim=1), after.logsumexp(dim=1))
    assert (before.logsumexp(dim=1) <= 1 + 1e-6).all()
    assert not network.has_scalable_logits()


@pytest.mark.parametrize("plain", [None, lambda: Small(aux=False)])
def test_a_network_of_a_user_has_the_embedding_of_its_classifier(plain, tmp_path):
    exported = export_user_network(Small(), tmp_path, plain=plain, training_only=["aux"])
    assert exported.manifest.outputs[1].shape == (None, 8)


@pytest.mark.parametrize("has_weights", [False, True])
def test_a_norm_behind_the_last_linear_layer_changes_its_outputs(has_weights):
    network = nn.Sequential(nn.Linear(8, CLASSES), nn.BatchNorm1d(CLASSES, affine=has_weights))
    assert last_linear(network[:1], CLASSES) is network[0]
    assert last_linear(network, CLASSES) is None


REJECTED = {
    "ends in another layer": nn.Sequential(
        nn.Conv2d(3, CLASSES, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ),
    "runs twice": variant(lambda n, x: n.fc(n.features(x)) + n.fc(n.features(-x)), aux=False),
}


@pytest.mark.parametrize("case", REJECTED)
def test_a_last_linear_layer_that_does_not_compute_the_logits_is_rejected(case, tmp_path):
    with pytest.raises(LoweringError, match="no last linear"):
        export_user_network(REJECTED[case], tmp_path)


def export_user_network(network, folder, **arguments):
    options = ExportOptions(max_batch=1, with_features=True)
    with proving_once(alone=True):
        return export_small(network.eval(), folder / "out", options=options, **arguments)


def test_the_service_and_both_clients_return_embeddings(tmp_path):
    name = "resnet8"
    exported = export_once(
        trained(name, pooling="isqrt"), name, tmp_path, max_batch=1, with_features=True
    )
    loaded, body = load_model(exported.path, SETTINGS), picture_bytes()
    with running(loaded.runtime, loaded.bundle, SETTINGS, names=["mine"]) as client:
        numbers = client.post("/v1/embed", content=body).json()
        text = client.post("/v1/embed?encoding_format=base64", content=body).json()["embedding"]
        listed = client.post("/v1/embed", files=[("image", body), ("image", b"no")]).json()[
            "results"
        ]

        assert client.post("/v1/embed", content=b"no").json()["code"] == "not_an_image"
        assert (
            client.post("/v1/embed?encoding_format=hex", content=body).json()["code"]
            == "invalid_parameter"
        )
        assert client.post("/v1/classify", content=body).json().keys() == {
            "classes",
            "warnings",
        }

        tensor = {
            "name": "images",
            "shape": [1, 16, 16, 3],
            "datatype": "UINT8",
            "data": [7] * 768,
        }
        by_default = client.post("/v2/models/mine/infer", json={"inputs": [tensor]}).json()[
            "outputs"
        ]
        with Client(str(client.base_url)) as python:
            found = python.embed(body)
            good, bad = python.embed([body, b"no"], model="mine")
            described = python.info().models[0]
    decoded = np.frombuffer(base64.b64decode(text), "<f4")

    assert (
        decoded.shape == exported.manifest.outputs[1].shape[1:] == (described.embedding_size,)
    )

    for values in (numbers["embedding"], listed[0]["embedding"], found.values, good.values):
        np.testing.assert_allclose(values, decoded, rtol=1e-4, atol=1e-5)
    assert (numbers["warnings"], listed[1].keys()) == ([], {"error"})
    assert (bad.error.code, bad.values.size, found.model_digest) == (
        "not_an_image",
        0,
        exported.manifest.id,
    )
    assert [output["name"] for output in by_default] == ["logits"]


def test_a_bundle_without_features_answers_with_a_code(branched):
    loaded = load_model(branched.path, SETTINGS)
    with running(loaded.runtime, loaded.bundle, SETTINGS) as client:
        answer = client.post("/v1/embed", content=picture_bytes())
        with (
            Client(str(client.base_url)) as python,
            pytest.raises(ServiceError, match="--with-features"),
        ):
            python.embed(picture_bytes())

    assert (answer.status_code, answer.json()["code"]) == (400, "no_features")
