"""Class activation maps from checkpoint to HTTP: exact maps, clear errors, no trace without them."""

import json

import numpy as np
import pytest
from PIL import Image

from sopdeploy.bundle.class_maps import ClassMapLayer, read_class_maps
from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.manifest import FEATURES
from sopdeploy.bundle.probes import read_probes
from sopdeploy.client import Client
from sopdeploy.errors import ConfigError, LoweringError, ParityError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import create_model
from sopdeploy_export import pipeline
from sopdeploy_export.graph import generated_images
from sopdeploy_export.parity.features import check_class_maps
from sopdeploy_service.commands.predict import predict_files
from sopdeploy_service.commands.verify import verify
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import Settings
from tests.export.conftest import LABELS, export_once, trained
from tests.service.conftest import picture_bytes, running

RULES = Preprocess(resize=20, crop=16, fit="pad")
SETTINGS = Settings(threads=1)


def layer_of(exported):
    return read_class_maps(exported.path, exported.manifest)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps")
    return export_once(trained("resnet8"), "resnet8", folder, preprocess=RULES, max_batch=4, with_cam=True)


def test_the_mean_of_a_map_plus_bias_is_the_logit_and_the_export_records_it(exported):
    record = exported.parity.class_maps
    assert 0 <= record.deviation <= record.tolerance == exported.parity.logits.tolerance
    assert [output.name for output in exported.manifest.outputs] == ["logits", FEATURES]
    assert "class_maps" in json.loads((exported.path / "parity.json").read_bytes())
    probes, layer = read_probes(exported.path / "probes.npz"), layer_of(exported)
    maps = np.array([[layer.map_of(image, c) for c in range(10)] for image in probes.expected[FEATURES]])
    assert maps.shape == (12, 10, 4, 4)
    found = maps.mean(axis=(2, 3)) + layer.bias
    assert np.abs(found - probes.expected["logits"]).max() <= record.tolerance
    assert {entry.deviation.keys() == {"logits", FEATURES} for entry in verify(exported.path).replays} == {
        True
    }


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_the_service_returns_the_map_of_the_best_or_a_chosen_class(exported, fit):
    body, layer = picture_bytes(size=(80, 40)), layer_of(exported)
    loaded = load_model(exported.path, SETTINGS)
    rules = RULES.model_copy(update={"fit": fit})
    bundle = open_bundle(exported.path)
    object.__setattr__(bundle, "manifest", bundle.manifest.model_copy(update={"preprocess": rules}))
    with running(loaded.runtime, bundle, SETTINGS, names=["maps"]) as client:
        assert client.get("/info").json()["models"][0]["class_maps"] is True
        answer = client.post("/v1/classify?explain=1&top_k=10", content=body).json()
        chosen = client.post("/v1/classify?explain_label=c", content=body).json()["class_map"]
        both = client.post("/v1/classify?explain=1", files=[("image", body), ("image", b"no")]).json()[
            "results"
        ]
        assert "class_map" not in client.post("/v1/classify", content=body).json()
        unknown = client.post("/v1/classify?explain_label=zebra", content=body)
        assert (unknown.status_code, unknown.json()["code"]) == (400, "unknown_label")
        assert client.get("/selftest").json()["deviation"].keys() == {"logits", FEATURES}
        with Client(str(client.base_url)) as python:
            assert python.classify(body, explain=True).class_map.label == answer["class_map"]["label"]
            assert python.classify(body, explain="c").class_map.values == tuple(map(tuple, chosen["values"]))
    found = answer["class_map"]
    assert found["label"] == answer["classes"][0]["label"] == both[0]["class_map"]["label"]
    assert (chosen["label"], both[1].keys()) == ("c", {"error"})
    assert found["image_size"] == [80, 40]
    assert found["box"] == ([24, 4, 56, 36] if fit == "crop" else [0, -20, 80, 60])
    probability = {entry["label"]: entry["probability"] for entry in answer["classes"]}
    difference = [np.mean(part["values"]) + part["bias"] for part in (found, chosen)]
    assert np.log(probability[found["label"]] / probability["c"]) == pytest.approx(
        difference[0] - difference[1], abs=1e-4
    )
    assert layer.bias[LABELS.index("c")] == pytest.approx(chosen["bias"])


def test_v2_returns_the_feature_map_only_if_it_is_named(exported):
    loaded = load_model(exported.path, SETTINGS)
    tensor = {"name": "images", "shape": [1, 16, 16, 3], "datatype": "UINT8", "data": [7] * 768}
    with running(loaded.runtime, loaded.bundle, SETTINGS, names=["maps"]) as client:
        for request, shapes in (
            ({}, {"logits": [1, 10]}),
            ({"outputs": [{"name": FEATURES}]}, {FEATURES: [1, 64, 4, 4]}),
        ):
            answer = client.post("/v2/models/maps/infer", json={"inputs": [tensor], **request}).json()
            assert {output["name"]: output["shape"] for output in answer["outputs"]} == shapes


def test_predict_draws_the_map_over_the_image(exported, branched, tmp_path):
    photo, drawing = tmp_path / "photo.jpg", tmp_path / "map.png"
    photo.write_bytes(picture_bytes(size=(120, 80)))
    (found,) = predict_files(exported.path, [photo], SETTINGS, drawing)
    assert found == predict_files(exported.path, [photo], SETTINGS)[0]
    with Image.open(drawing) as image, Image.open(photo) as original:
        assert (image.format, image.size) == ("PNG", original.size)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(original)).max() > 50
    drawing.unlink()
    cases = [
        (exported.path, [photo, photo], drawing, "needs exactly one image"),
        (exported.path, [photo], tmp_path / "map.jpg", "the name of a .png file"),
        (branched.path, [photo], drawing, "has no class activation maps; export it with_cam"),
    ]
    for bundle, images, target, message in cases:
        with pytest.raises(ConfigError, match=message):
            predict_files(bundle, images, SETTINGS, target)
    assert not drawing.exists()


def test_a_bundle_without_maps_answers_with_a_code(branched):
    loaded = load_model(branched.path, SETTINGS)
    with running(loaded.runtime, loaded.bundle, SETTINGS) as client:
        answer = client.post("/v1/classify?explain=1", content=picture_bytes())
    assert (answer.status_code, answer.json()["code"]) == (400, "no_class_maps")


@pytest.mark.parametrize("name", ["isqrt-resnet8", "gmgap-16-8-resnet18"])
def test_a_network_without_average_pooling_and_linear_layer_stops_before_any_computation(
    name, tmp_path, monkeypatch
):
    monkeypatch.setattr(pipeline, "certify", pytest.fail)
    message = r"^with_cam: .* does not end in average pooling .*; train it with the pooling gap"
    with pytest.raises(LoweringError, match=message):
        export_once(create_model(name, num_classes=10).eval(), name, tmp_path, with_cam=True)
    assert not (tmp_path / "out").exists()


def test_maps_of_another_layer_stop_the_export(exported):
    layer = layer_of(exported)
    wrong = ClassMapLayer(layer.weight, layer.bias + np.float32(1e-3))
    with pytest.raises(ParityError, match=r"maps deviate from the logits by 0\.001"):
        check_class_maps(exported.path / "model.onnx", wrong, generated_images(RULES.crop), exported.parity)
