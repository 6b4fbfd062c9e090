from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from PIL import Image
from torch import nn

from sopdeploy.base.project import Origin
from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.golden import read_golden
from sopdeploy.bundle.onnx_root import onnx_root
from sopdeploy.bundle.probes import read_probes
from sopdeploy.errors import (
    DataError,
    DetachError,
    LoweringError,
    SopdeployError,
    command_line_option,
)
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import create_model
from sopdeploy.weights.checkpoint import read_checkpoint, write_checkpoint
from sopdeploy_commands.verify import verify
from sopdeploy_export.capture.deployed import Deployed, generated_images
from sopdeploy_export.export_checkpoint import export_checkpoint
from sopdeploy_export.last_layer import fold_temperature
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.pack.results import Exported
from sopdeploy_service.settings import Settings
from tests.export.conftest import GMGAP, LABELS, save, trained
from tests.export.once import proving_once
from tests.support.forged import write_hollow

DETACH = ExportOptions(detach=True, max_batch=4)


@pytest.fixture(scope="module")
def checkpoint(preprocess: Preprocess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(
        trained(), "dsop-resnet8", tmp_path_factory.mktemp("run") / "ckpt.pt", preprocess
    )


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    with proving_once():  # as `branched`, whose programs are cached
        return export_checkpoint(checkpoint, tmp_path_factory.mktemp("bundles"), options=DETACH)


def test_bundle_opens_and_records_the_certificate(exported: Exported) -> None:
    bundle = open_bundle(exported.path)
    assert exported.path.name == bundle.name
    assert bundle.labels == LABELS
    assert bundle.manifest.detached == ("branches",)
    assert (
        bundle.manifest.lineage.onnx_root
        == onnx_root(onnx.load_model_from_string(bundle.onnx.read()))
        == exported.certificate.roots.onnx
    )
    assert bundle.manifest.lineage.program_root == exported.certificate.roots.any_batch
    assert {path.name for path in exported.path.iterdir()} == {
        *bundle.manifest.files,
        "manifest.json",
    }
    assert len(read_golden(bundle)) == verify(exported.path, Settings(threads=1)).golden == 3

    probes = read_probes(bundle)
    assert probes.images.shape == (4, 16, 16, 3)
    assert probes.tolerance["logits"] == exported.parity.logits.tolerance

    names = [
        tensor.name
        for tensor in onnx.load_model_from_string(bundle.onnx.read()).graph.initializer
    ]
    assert not [name for name in names if "branch" in name]
    assert {entry.name.split(".")[0] for entry in exported.certificate.removed} == {"branches"}
    before, after = exported.trained.parameters, exported.shipped.parameters
    assert exported.sizes()["parameters"] == f"{before:,} -> {after:,}"
    num_kept = len(exported.certificate.kept) + len(exported.certificate.unreached)
    assert exported.facts()["kept"].startswith(f"{num_kept} tensors")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "evaluate",
            r"dog .*a, b.* j",
        ),
        ("calibrate", "no images"),
    ],
)
def test_folders_are_checked_before_the_first_expensive_step(
    checkpoint: Path, tmp_path: Path, option: str, message: str
) -> None:
    folder = tmp_path / "photos"
    (folder / "dog").mkdir(parents=True)
    if option == "evaluate":
        Image.new("RGB", (8, 8)).save(folder / "dog" / "1.png")
    precision = "int8" if option == "calibrate" else "fp16"
    options = ExportOptions(detach=True, precision=precision, **{option: folder})
    steps: list[str] = []

    with pytest.raises(DataError, match=message):
        export_checkpoint(
            checkpoint, tmp_path / "bundles", options=options, on_step=steps.append
        )
    assert steps == []


def test_a_folder_that_cannot_be_written_is_reported_before_the_network_runs(
    checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    steps: list[str] = []
    with pytest.raises(SopdeployError, match="file"):
        export_checkpoint(
            checkpoint, tmp_path / "file" / "out", options=DETACH, on_step=steps.append
        )
    assert steps == []


def test_the_time_of_an_export_contains_its_run_and_its_capture(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each step takes 100 s of this clock.
    passed = [0.0]
    clock = SimpleNamespace(monotonic=lambda: passed[0])
    for module in ("export_checkpoint", "pipeline"):
        monkeypatch.setattr(f"sopdeploy_export.{module}.time", clock)
    steps: list[str] = []

    def begin(step: str) -> None:
        steps.append(step)
        passed[0] += 100

    with proving_once():
        again = export_checkpoint(checkpoint, tmp_path, options=DETACH, on_step=begin)
    assert steps[:2] == ["running the network", "capturing the network"]
    assert again.seconds == 100 * len(steps)


def test_a_bundle_of_this_name_with_other_images_stops_the_export_early(
    checkpoint: Path, tmp_path: Path
) -> None:
    started = "2026-01-02T03:04:05.000000Z"
    run = {"run": "photos-1", "run_id": "0" * 12, "started": started, "data": "photos"}
    other = Origin(**run, num_images=40, num_classes=4, sample=(3, -4))
    write_hollow(tmp_path / "bundles", project="photos", origin=other)
    path = tmp_path / "best.pt"

    def attempt(images: list[int], **options: Any) -> list[str]:
        hashes, steps = torch.tensor(sorted(images), dtype=torch.int64), list[str]()
        write_checkpoint(
            path, replace(read_checkpoint(checkpoint), project="photos", image_hashes=hashes)
        )
        chosen = DETACH.model_copy(update={"evaluate": tmp_path / "no folder", **options})

        with pytest.raises(SopdeployError) as error:
            export_checkpoint(path, tmp_path / "bundles", options=chosen, on_step=steps.append)

        return [*steps, error.value.describe(command_line_option)]

    [refusal] = attempt([1, 2])
    assert refusal.startswith(f"{tmp_path / 'bundles'}: ")
    assert refusal.endswith("--name NAME")
    for images, options in (
        ([1, 2, -4], {}),
        ([1, 2], {"name": "photos"}),
        ([1, 2], {"name": "hats"}),
        ([], {}),
    ):
        assert "no folder" in attempt(images, **options)[-1]

    write_hollow(tmp_path / "bundles", project="photos", origin=None)
    assert attempt([1, 2])[-1].endswith("--name NAME")


def test_exports_of_one_checkpoint_differ_in_their_time_only(
    exported: Exported, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1767323045")
    with proving_once():
        again = export_checkpoint(checkpoint, tmp_path, options=DETACH)

    assert again.path.name == exported.path.name
    for name in exported.manifest.files:
        assert (again.path / name).read_bytes() == (exported.path / name).read_bytes(), name

    same_time = exported.manifest.model_copy(
        update={"exported_at": "2026-01-02T03:04:05.000000Z"}
    )
    assert (again.path / "manifest.json").read_bytes() == same_time.to_bytes()


def test_training_only_parts_without_detach_fail_in_one_line_and_write_nothing(
    checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(DetachError, match="try detach=True") as problem:
        export_checkpoint(checkpoint, tmp_path / "out", options=ExportOptions(max_batch=4))
    assert "\n" not in str(problem.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["dsop-resnet8", "gmgap-16-8-resnet18"])
def test_a_folded_temperature_divides_the_logits_and_no_other_output(
    preprocess: Preprocess, name: str
) -> None:
    network = trained(name, **({} if name == "dsop-resnet8" else GMGAP))
    images, ones = generated_images(preprocess.crop), torch.ones(2, 3, 16, 16)
    deployed = Deployed(network, preprocess).eval()

    @torch.no_grad()
    def outputs() -> list[torch.Tensor]:
        return [*deployed(torch.from_numpy(images)), *network.heads(ones).values()]

    before = outputs()
    fold_temperature(network, 1.7, preprocess, images, 10)
    after = outputs()
    # Logits, gates or branches, the main head
    factors = [1.7, *(1.0 for _ in before[1:-1]), 1.7]
    for old, new, factor in zip(before, after, factors, strict=True):
        assert torch.allclose(new * factor, old, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "classifier",
    [nn.Identity(), nn.Linear(64, 10)],
    ids=["no linear classifier", "an activation behind it"],
)
def test_a_temperature_that_cannot_be_folded_is_an_error(
    preprocess: Preprocess, classifier: nn.Module
) -> None:
    network = create_model("resnet8", num_classes=10).eval()
    network.fc = classifier
    classify = network.classify
    network.classify = lambda features: classify(features).tanh()  # type: ignore[method-assign]

    with pytest.raises(LoweringError, match="PlainSmallResNet"):
        fold_temperature(network, 1.7, preprocess, generated_images(preprocess.crop), 10)
