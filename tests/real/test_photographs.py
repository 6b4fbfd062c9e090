"""A network with ImageNet weights on real photographs: trained on few, exported, quantized and used."""

from pathlib import Path

import pytest
import torch

import sopdeploy
from sopdeploy.bundle.manifest import Int8For
from sopdeploy.training.records.results import FewShotResult, LoopResult
from sopdeploy.weights.checkpoint import read_checkpoint
from sopdeploy.weights.tensor_files import load_plain
from sopdeploy_commands.verify import verify
from sopdeploy_export.export_checkpoint import export_checkpoint
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.pack.results import Exported
from sopdeploy_service.settings import Settings
from tests.real.conftest import LITE0


@pytest.fixture(scope="module")
def checkpoint(
    lite0_file: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A network for four kinds of clothing, on the frozen Lite0."""
    out = tmp_path_factory.mktemp("run") / "run"
    return sopdeploy.train(photos, out=out, weights=lite0_file, **{"model.name": LITE0}).best


def int8(checkpoint: Path, photos: Path, folder: Path, runtime: Int8For) -> Exported:
    options = ExportOptions(precision="int8", calibrate=photos, int8_for=runtime, max_drop=4)
    return export_checkpoint(checkpoint, folder, options=options)


@pytest.mark.nightly
@pytest.mark.parametrize("runtime", ["cpu", "tensorrt"])
def test_int8_agrees_with_float32_on_all_but_one_photograph(
    checkpoint: Path, photos: Path, tmp_path: Path, runtime: Int8For
) -> None:
    found = int8(checkpoint, photos, tmp_path, runtime)

    assert found.precision.accuracy is not None
    assert found.precision.accuracy.num_images - found.precision.accuracy.num_agreeing <= 1
    assert found.precision.quantisation is not None
    assert verify(found.path, Settings(threads=1)).golden == 4


@pytest.mark.slow
def test_eight_photographs_of_each_class_are_enough_for_clothes(
    photos: Path, lite0_file: Path, tmp_path: Path
) -> None:
    run = sopdeploy.train(
        photos, out=tmp_path / "run", weights=lite0_file, **{"model.name": LITE0}
    )

    assert isinstance(run.procedure, FewShotResult)
    assert run.procedure.top1 is not None
    assert run.procedure.top1.count == 32
    assert run.procedure.top1.share > 0.85
    assert run.procedure.head == f"{LITE0} gap+isqrt of blocks.4, blocks.6"
    checkpoint = read_checkpoint(run.best)
    assert checkpoint.labels == ("dress", "hat", "pants", "shoes")


@pytest.mark.nightly
def test_fine_tuning_with_branches_leaves_a_network_to_serve(
    photos: Path, lite0_file: Path, tmp_path: Path
) -> None:
    settings = [
        "procedure.kind=fine_tune",
        "epochs=1",
        "preprocess.crop=64",
        f"model.name=dsop-{LITE0}",
    ]
    run = sopdeploy.train(photos, out=tmp_path / "run", weights=lite0_file, set=settings)

    assert isinstance(run.procedure, FewShotResult | LoopResult)
    assert run.procedure.tuning is not None
    assert run.procedure.tuning.count == run.held_out_count

    start = load_plain(lite0_file, lite0_file.read_bytes())
    trained = read_checkpoint(run.last).weights
    assert torch.equal(trained["blocks.2.1.conv_pw.weight"], start["blocks.2.1.conv_pw.weight"])
    assert torch.equal(
        trained["blocks.6.0.bn1.running_mean"], start["blocks.6.0.bn1.running_mean"]
    )
    assert not torch.equal(
        trained["blocks.3.0.conv_pw.weight"], start["blocks.3.0.conv_pw.weight"]
    )
    assert not torch.equal(trained["blocks.6.0.bn1.weight"], start["blocks.6.0.bn1.weight"])

    exported = sopdeploy.export(run.last, tmp_path / "bundles", detach=True, max_batch=1)
    assert exported.certificate.detached == ("branches",)
    assert verify(exported.path, Settings(threads=1)).golden == 4
