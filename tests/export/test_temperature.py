"""The temperature of a decision: divided into the classifier, or with `trained_logits` left to the decision."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.bundle.decision import Calibration, Decision, Rejection
from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.manifest import CERTIFICATE, describe_temperature, to_json
from sopdeploy.bundle.probes import read_probes
from sopdeploy.errors import BundleError, LoweringError
from sopdeploy.weights.checkpoint import (
    Checkpoint,
    build_classifier,
    read_checkpoint,
    write_checkpoint,
)
from sopdeploy_commands.compare import compare
from sopdeploy_commands.predict import predict
from sopdeploy_commands.scores import scores_of_bundle
from sopdeploy_commands.verify import verify
from sopdeploy_export import last_layer
from sopdeploy_export.capture.deployed import Deployed
from sopdeploy_export.export_checkpoint import export_checkpoint
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.pack.results import Exported
from sopdeploy_export.program_hashes import tensor_hash
from sopdeploy_service.api.status import read_card
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.keep import QueuedPhoto, describe
from sopdeploy_service.settings import Settings
from tests.export.conftest import LABELS, PREPROCESS, trained
from tests.export.once import proving_once
from tests.support.forged import bind, forge
from tests.support.service import running

TEMPERATURE = 0.3
SETTINGS = Settings(threads=1)


def decide(temperature: float = TEMPERATURE) -> Decision:
    return Decision(
        calibration=Calibration(
            temperature=temperature,
            loss_before=1,
            loss_after=0.5,
            num_images=359,
            estimated_on="held-out",
        ),
        rejection=Rejection(threshold=4.0),
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = trained("resnet8")
    path = tmp_path_factory.mktemp("run") / "best.pt"
    write_checkpoint(
        path,
        Checkpoint(
            model="resnet8",
            config=network.config.model_dump(mode="json"),
            weights=network.state_dict(),
            labels=LABELS,
            preprocess=PREPROCESS,
            training={},
            decision=decide(),
        ),
    )
    return path


def export(checkpoint: Path, folder: Path, *, trained_logits: bool) -> Exported:
    options = ExportOptions(max_batch=1, trained_logits=trained_logits)
    with proving_once(alone=True):
        return export_checkpoint(checkpoint, folder, options=options)


@pytest.fixture(scope="module")
def divided(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(checkpoint, tmp_path_factory.mktemp("divided"), trained_logits=False)


@pytest.fixture(scope="module")
def kept(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(checkpoint, tmp_path_factory.mktemp("kept"), trained_logits=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos of two classes."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(6):
        path = folder / LABELS[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        cells = random.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(cells).resize((16, 16), Image.Resampling.NEAREST).save(path)
    return folder


def logits_of(path: Path) -> NDArray[np.float32]:
    """Compute the logits (P, C) of the reference images, one by one."""
    run = load_model(path, SETTINGS).runtime.run
    images = read_probes(open_bundle(path)).images
    return np.concatenate([run(image[None])["logits"] for image in images])


def test_the_logits_are_divided_or_with_the_option_as_trained(
    checkpoint: Path, divided: Exported, kept: Exported
) -> None:
    network = build_classifier(read_checkpoint(checkpoint), checkpoint).eval()
    images = read_probes(open_bundle(kept.path)).images
    with torch.no_grad():
        expected = Deployed(network, PREPROCESS)(torch.from_numpy(images))[0].numpy()

    np.testing.assert_allclose(logits_of(kept.path), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        logits_of(divided.path), expected / TEMPERATURE, rtol=1e-5, atol=1e-5
    )


def test_certificate_manifest_and_card_name_the_divided_tensors(
    checkpoint: Path, divided: Exported
) -> None:
    manifest = open_bundle(divided.path).manifest
    scaling = manifest.temperature_scaling
    assert scaling == divided.certificate.temperature_scaling
    assert scaling.temperature == TEMPERATURE
    assert [tensor.name for tensor in scaling.tensors] == ["fc.weight", "fc.bias"]
    weights = read_checkpoint(checkpoint).weights
    kept = {entry.name: entry.sha256 for entry in divided.certificate.kept}
    for tensor in scaling.tensors:
        assert tensor.before == tensor_hash(weights[tensor.name])
        assert tensor.after == kept[tensor.name] != tensor.before

    card = (divided.path / "README.md").read_text(encoding="utf-8")
    for text in (
        card,
        divided.notable_facts()["logits"],
        verify(divided.path, SETTINGS).logits,
    ):
        assert "divided by the temperature 0.3" in text
    assert "trained (classifier divided by 0.3) = " in divided.facts()["graph"]
    assert read_card(open_bundle(divided.path)).certificate.divided_by == TEMPERATURE


def test_with_the_option_nothing_was_divided_and_the_decision_divides(kept: Exported) -> None:
    manifest = open_bundle(kept.path).manifest
    assert manifest.temperature_scaling is kept.certificate.temperature_scaling is None
    assert manifest.decision == decide().for_trained_logits()

    card = (kept.path / "README.md").read_text(encoding="utf-8")
    for text in (card, kept.notable_facts()["logits"], verify(kept.path, SETTINGS).logits):
        assert "divide them by the temperature 0.3" in text
    assert "divided by" not in kept.facts()["graph"]


Values = tuple[list[Any], list[float]]  # what must be equal, and what may differ by rounding


def predicted(path: Path, photos: Path) -> Iterator[Values]:
    for prediction in predict(path, photos, explain=True, threads=1):
        losses = [loss for row in prediction.explanation for loss in row]
        probabilities = [each.probability for each in prediction.classes]
        labels = [each.label for each in prediction.classes]
        yield [*labels, prediction.known], [*probabilities, prediction.score, *losses]


def served(path: Path, photos: Path) -> Iterator[Values]:
    loaded = load_model(path, SETTINGS)
    with running(loaded.runtime, loaded.bundle, SETTINGS, names=["mine"]) as client:
        for photo in sorted(photos.rglob("*.png")):
            answer = client.post("/v1/classify", content=photo.read_bytes()).json()
            labels = [each["label"] for each in answer["classes"]]
            probabilities = [each["probability"] for each in answer["classes"]]
            yield [*labels, answer["known"]], [*probabilities, answer["score"]]

        # A client of `/v2` computes the probabilities itself.
        temperature = client.get("/info").json()["models"][0].get("temperature", 1)
        tensor = {"name": "images", "shape": [1, 16, 16, 3], "datatype": "UINT8"}
        body = {"inputs": [{**tensor, "data": [*range(256)] * 3}]}
        (output,) = client.post("/v2/models/mine/infer", json=body).json()["outputs"]
        yield [], (torch.tensor(output["data"]) / temperature).softmax(dim=0).tolist()


def evaluated(path: Path, photos: Path) -> Iterator[Values]:
    _, scores, *_ = scores_of_bundle(
        path, photos, settings=SETTINGS, on_image=lambda *_: None, mirror=True
    )
    for score in scores:
        yield [score.top5, score.known], [score.confidence, score.likelihood]


def kept_photos(path: Path, _photos: Path) -> Iterator[Values]:
    """What the records of kept photos say about the reference images."""
    bundle = open_bundle(path)
    for logits in logits_of(path):
        photo = QueuedPhoto(b"", logits, bundle, "tiny", datetime.now(UTC), None)
        record = describe(photo, ["sample"])
        yield [record["known"]], [record["score"], *record["probabilities"].values()]


@pytest.mark.parametrize("consume", [predicted, served, evaluated, kept_photos])
def test_both_bundles_give_the_same_probabilities_and_known(
    consume: Callable[..., Iterator[Values]], divided: Exported, kept: Exported, photos: Path
) -> None:
    found = list(consume(kept.path, photos))
    expected = list(consume(divided.path, photos))
    assert len(found) > 0
    assert [equal for equal, _ in found] == [equal for equal, _ in expected]

    for (_, values), (_, others) in zip(found, expected, strict=True):
        np.testing.assert_allclose(values, others, rtol=1e-4, atol=1e-5)


def test_a_comparison_of_both_finds_no_difference(
    divided: Exported, kept: Exported, photos: Path
) -> None:
    found = compare(divided.path, kept.path, photos)
    assert (found.wins, found.losses) == (0, 0)


@pytest.fixture
def copied(divided: Exported, tmp_path: Path) -> Path:
    """A copy of the bundle whose classifier is divided."""
    folder = tmp_path / divided.path.name
    folder.mkdir()
    for file in divided.path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


WRONG: dict[str, Callable[[dict[str, Any]], None]] = {
    "no record": lambda fields: fields.pop("temperature_scaling"),
    "another temperature": lambda fields: fields["temperature_scaling"].update(temperature=2.0),
    "other kept tensors": lambda fields: fields.update(kept=[]),
    "a kept tensor without hash": lambda fields: fields.update(kept=[{"name": "fc.weight"}]),
    "another kept tensor": lambda fields: [
        entry.update(sha256="0" * 64) for entry in fields["kept"] if entry["name"] == "fc.bias"
    ],
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_certificate_of_another_division_is_refused(
    change: Callable[[dict[str, Any]], None], copied: Path
) -> None:
    certificate = json.loads((copied / CERTIFICATE).read_bytes())
    change(certificate)
    (copied / CERTIFICATE).write_bytes(to_json(certificate))
    bind(copied, open_bundle(forge(copied)).manifest)

    with pytest.raises(BundleError, match=CERTIFICATE) as problem:
        verify(copied, SETTINGS)
    assert problem.value.exit_code == 2


@pytest.mark.parametrize(
    "decision",
    [None, decide(0.5), decide().for_trained_logits()],
    ids=["none", "other", "twice"],
)
def test_a_manifest_whose_decision_does_not_fit_the_division_is_refused(
    decision: Decision | None, copied: Path
) -> None:
    manifest = open_bundle(copied).manifest.model_copy(update={"decision": decision})
    (copied / "manifest.json").write_bytes(manifest.to_bytes())
    with pytest.raises(BundleError, match="temperature_scaling"):
        open_bundle(copied)


def test_without_a_linear_layer_the_error_names_an_option_that_exports(
    checkpoint: Path, kept: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(last_layer, "find_last_layer", lambda *_: None)
    with pytest.raises(LoweringError) as problem:
        export(checkpoint, tmp_path, trained_logits=False)
    assert problem.value.remedies == {"trained_logits": True}
    assert export(checkpoint, tmp_path, trained_logits=True).manifest.id == kept.manifest.id


DESCRIBED = {
    "no decision": (None, ""),
    "no calibration": (Decision(), ""),
    "a network that contains it": (decide(1.0), ""),
    "a bundle of 0.3.0": (decide(), "classifier"),
    "trained logits": (decide().for_trained_logits(), "as trained"),
}


@pytest.mark.parametrize(("decision", "expected"), DESCRIBED.values(), ids=DESCRIBED)
def test_only_a_temperature_other_than_one_is_described(
    decision: Decision | None, expected: str
) -> None:
    text = describe_temperature(decision, None)
    assert expected in text
    assert bool(text) == bool(expected)
