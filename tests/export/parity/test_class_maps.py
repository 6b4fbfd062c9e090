"""Class activation maps from checkpoint to HTTP: exact maps, clear errors, no trace without them."""

import json
import re
from dataclasses import replace

import numpy as np
import onnx
import pytest
from PIL import Image

from sopdeploy.bundle.class_maps import FEATURES, FILE, ClassMapLayer, read_class_maps
from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.bundle.probes import read_probes
from sopdeploy.checkpoint import read_checkpoint, write_checkpoint
from sopdeploy.client import Client
from sopdeploy.errors import BundleError, ConfigError, LoweringError, ParityError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import create_model
from sopdeploy_export import pipeline
from sopdeploy_export.graph import probe_images
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.parity.class_maps import check_class_maps
from sopdeploy_export.pipeline import export
from sopdeploy_service.commands.predict import predict
from sopdeploy_service.commands.verify import verify
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import Settings
from tests.export.conftest import LABELS, save, trained
from tests.export.once import proving_once
from tests.service.conftest import picture_bytes, running

RULES = Preprocess(resize=20, crop=16, fit="pad")
SETTINGS = Settings(threads=1)
BATCH = BatchRange(optimum=2, maximum=4)


def layer_of(exported):
    return read_class_maps(exported.path, exported.manifest)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(trained("resnet8"), "resnet8", tmp_path_factory.mktemp("checkpoint") / "ckpt.pt", RULES)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    with proving_once():
        return export(checkpoint, tmp_path_factory.mktemp("maps"), ExportOptions(max_batch=4, with_cam=True))


def test_the_mean_of_a_map_plus_bias_is_the_logit_and_the_export_records_it(exported):
    record = exported.parity.class_maps
    assert 0 <= record.deviation <= record.tolerance == exported.parity.logits.tolerance
    assert [output.name for output in exported.manifest.outputs] == ["logits", FEATURES]
    assert "class_maps" in json.loads((exported.path / "parity.json").read_bytes())
    probes, layer = (
        read_probes(exported.path / "probes.npz"),
        read_class_maps(exported.path, exported.manifest),
    )
    maps = np.array([[layer.map_of(image, c) for c in range(10)] for image in probes.expected[FEATURES]])
    assert maps.shape == (12, 10, 4, 4)
    found = maps.mean(axis=(2, 3)) + layer.bias
    assert np.abs(found - probes.expected["logits"]).max() <= record.tolerance
    assert {entry.deviation.keys() == {"logits", FEATURES} for entry in verify(exported.path).replays} == {
        True
    }


@pytest.mark.slow
def test_an_export_without_the_option_has_no_trace_of_it(exported, branched):
    assert [output.name for output in branched.manifest.outputs] == ["logits"]
    assert FILE not in branched.manifest.files
    assert "class_maps" not in json.loads((branched.path / "parity.json").read_bytes())
    graphs = [onnx.load(found.path / "model.onnx").graph for found in (branched, exported)]
    names = [[node.op_type for node in graph.node] for graph in graphs]
    assert names[0] == names[1]  # the feature map is an intermediate value of the same graph


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
    (found,) = predict(exported.path, [photo], SETTINGS, drawing)
    assert found == predict(exported.path, [photo], SETTINGS)[0]
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
            predict(bundle, images, SETTINGS, target)
    assert not drawing.exists()


def test_a_bundle_without_maps_answers_with_a_code(branched):
    loaded = load_model(branched.path, SETTINGS)
    with running(loaded.runtime, loaded.bundle, SETTINGS) as client:
        answer = client.post("/v1/classify?explain=1", content=picture_bytes())
    assert (answer.status_code, answer.json()["code"]) == (400, "no_class_maps")


COVARIANCE = "ends in isqrt pooling instead of average pooling, so no map adds up to its logits"


@pytest.mark.parametrize(
    ("name", "training", "message"),
    [
        ("isqrt-resnet8", {}, f"{COVARIANCE}; train it with the pooling gap"),
        ("isqrt-resnet8", {"few_shot": {}}, f'{COVARIANCE}; train it with few_shot.heads=["gap"]'),
        ("gmgap-16-8-resnet18", {}, "does not end in average pooling and one linear layer, so no map"),
    ],
    ids=["covariance", "covariance chosen by the few-shot procedure", "another head"],
)
def test_a_network_without_average_pooling_and_linear_layer_stops_before_any_computation(
    name, training, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(pipeline, "certify", pytest.fail)
    network = create_model(name, num_classes=10).eval()
    path = save(network, name, tmp_path / "ckpt.pt", RULES)
    write_checkpoint(path, replace(read_checkpoint(path), training=training))
    with pytest.raises(LoweringError, match=rf"^with_cam: .* {re.escape(message)}"):
        export(path, tmp_path / "out", ExportOptions(detach=bool(network.training_only), with_cam=True))
    assert not (tmp_path / "out").exists()


def test_maps_of_another_layer_stop_the_export(exported):
    layer = layer_of(exported)
    wrong = ClassMapLayer(layer.weight, layer.bias + np.float32(1e-3))
    with pytest.raises(ParityError, match=r"maps deviate from the logits by 0\.001"):
        check_class_maps(exported.path / "model.onnx", wrong, probe_images(RULES), exported.parity)


def test_a_bundle_whose_layer_does_not_fit_is_rejected(exported, tmp_path):
    np.savez(tmp_path / FILE, weight=np.zeros((3, 64), np.float32), bias=np.zeros(3, np.float32))
    with pytest.raises(BundleError, match="does not fit the outputs"):
        read_class_maps(tmp_path, exported.manifest)
    (tmp_path / FILE).write_bytes(b"PK")
    with pytest.raises(BundleError, match="not a file of class activation maps"):
        read_class_maps(tmp_path, exported.manifest)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_maps_of_a_reduced_precision_are_exact_within_its_noise(checkpoint, tmp_path, precision):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(probe_images(RULES)):
        Image.fromarray(image).save(folder / f"{number}.png")
    options = ExportOptions(
        max_batch=4,
        with_cam=True,
        precision=precision,
        calibrate=folder if precision == "int8" else None,
        max_drop=100.0,
        allow_drift=True,
    )
    found = export(checkpoint, tmp_path / "out", options).parity
    assert found.class_maps.deviation <= found.class_maps.tolerance
