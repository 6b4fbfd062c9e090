"""`sopdeploy engine --set via=torch-tensorrt`: real converters and a real build; loading a plan needs a GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement

from sopdeploy.bundle.decision import Calibration, Decision
from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.probes import read_probes
from sopdeploy.errors import (
    CertificateError,
    CheckpointError,
    ConfigError,
    EngineError,
    RuntimeUnavailableError,
)
from sopdeploy.models.base import Classifier
from sopdeploy.weights.checkpoint import Checkpoint, write_checkpoint
from sopdeploy_commands.engine import engine
from sopdeploy_commands.engine_builder.from_program import build_from_program
from sopdeploy_export.export_checkpoint import export_checkpoint, rebuild_program
from sopdeploy_export.options import EngineOptions, ExportOptions
from sopdeploy_export.pack.results import Exported
from sopdeploy_service.runtime.tensorrt_cache import Profile
from tests.export.conftest import LABELS, PREPROCESS, export_once, save, trained
from tests.export.once import proving_once
from tests.export.user_network.networks import Small, export_small
from tests.support.forged import write_hollow
from tests.support.rooms import PYTHONPATH

FOLDER = Path(sys.prefix) / "cuda" / "torch-tensorrt"
PROFILE = Profile(minimum=1, maximum=4)
CALIBRATED = Decision(
    calibration=Calibration(
        temperature=1.5, loss_before=1, loss_after=0.5, num_images=9, estimated_on="held-out"
    )
)


def absent() -> str:
    """Say why torch-tensorrt does not run here, "" if it does."""
    if not FOLDER.is_dir():
        return "torch-tensorrt is not installed (`make cuda-stand-in`)"
    needed = [
        Requirement(line)
        for one in distributions(path=[str(FOLDER)])
        for line in one.requires or ()
    ]
    unfit = [
        str(one)
        for one in needed
        if one.name == "torch" and torch.__version__ not in one.specifier
    ]
    return f"the installed torch-tensorrt needs {unfit[0]}" if unfit else ""


needs_converters = pytest.mark.skipif(bool(absent()), reason=absent())


def checkpoint_of(exported: Exported) -> Path:
    """Return the checkpoint that `export_once` wrote."""
    return exported.path.parents[1] / "ckpt.pt"


def build(exported: Exported) -> bytes:
    bundle = open_bundle(exported.path)
    read_program = partial(rebuild_program, checkpoint_of(exported), bundle.manifest)
    return build_from_program(bundle, read_program, PROFILE, 1 << 30)


def converted(exported: Exported) -> dict[str, object]:
    """Build the program of *exported* in a process of its own."""
    paths = f"{PYTHONPATH}{os.pathsep}{FOLDER}"
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    program = str(Path(__file__).parents[1] / "convert_program.py")
    command = [sys.executable, program, str(exported.path), str(checkpoint_of(exported))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answer


@needs_converters
def test_torch_tensorrt_converts_every_operator_and_keeps_the_names_of_tensors(
    branched: Exported,
) -> None:
    answer = converted(branched)
    assert answer["tensors"] == ["images", "logits"]
    assert int(str(answer["bytes"])) > 100_000


@needs_converters
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "config", "outputs"),
    [
        ("resnet8", {"pooling": "isqrt"}, ["logits"]),
        ("gsop-net2-preact-resnet164", {"blocks": 3}, ["logits"]),
        ("gmsop-16-8-resnet18", {}, ["logits", "gates"]),
    ],
)
def test_torch_tensorrt_converts_every_family(
    name: str,
    config: dict[str, Any],
    outputs: list[str],
    make: Callable[..., Classifier],
    tmp_path: Path,
) -> None:
    exported = export_once(make(name, **config), name, tmp_path, max_batch=4)
    assert converted(exported)["tensors"] == ["images", *outputs]


@pytest.mark.parametrize(
    ("decision", "trained_logits"),
    [
        pytest.param(None, False, id="logits"),
        pytest.param(CALIBRATED, False, id="temperature", marks=pytest.mark.slow),
        pytest.param(CALIBRATED, True, id="trained logits", marks=pytest.mark.slow),
    ],
)
def test_the_program_is_built_again_from_the_checkpoint_and_gives_the_logits(
    decision: Decision | None, trained_logits: bool, tmp_path: Path
) -> None:
    network = trained()
    checkpoint = Checkpoint(
        model="dsop-resnet8",
        config=network.config.model_dump(mode="json"),
        weights=network.state_dict(),
        labels=LABELS,
        preprocess=PREPROCESS,
        training={},
        decision=decision,
    )
    write_checkpoint(tmp_path / "ckpt.pt", checkpoint)
    options = ExportOptions(
        detach=True, max_batch=4, with_features=True, trained_logits=trained_logits
    )
    with proving_once():  # the program is captured again below
        exported = export_checkpoint(tmp_path / "ckpt.pt", tmp_path / "out", options=options)
    program, probes = (
        rebuild_program(tmp_path / "ckpt.pt", exported.manifest),
        read_probes(open_bundle(exported.path)),
    )
    logits, embedding = program.module()(torch.from_numpy(probes.images[:3]))

    for name, values in (("logits", logits), ("embedding", embedding)):
        difference = np.abs(values.detach().numpy() - probes.expected[name][:3]).max()
        assert difference <= probes.tolerance[name]


@pytest.mark.slow
def test_the_program_of_another_checkpoint_or_torch_is_refused(
    branched: Exported, tmp_path: Path
) -> None:
    other = save(trained("resnet8"), "resnet8", tmp_path / "other.pt", PREPROCESS)
    with pytest.raises(CheckpointError, match=r"^\S*other\.pt: "):
        rebuild_program(other, branched.manifest)

    lineage = branched.manifest.lineage.model_copy(update={"program_root": "0" * 64})
    manifest = branched.manifest.model_copy(update={"lineage": lineage})
    with pytest.raises(CertificateError, match=r"0{16}"):
        rebuild_program(checkpoint_of(branched), manifest)


def test_the_checkpoint_is_given_with_torch_tensorrt_only(tmp_path: Path) -> None:
    bundle = write_hollow(tmp_path)
    with pytest.raises(ConfigError, match=r"^via: "):
        engine(bundle, via="torch-tensorrt")
    with pytest.raises(ConfigError, match=r"^checkpoint: "):
        EngineOptions(checkpoint=Path("best.pt"))


@pytest.fixture(scope="module")
def of_a_user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a network outside of the catalog."""
    folder, options = tmp_path_factory.mktemp("own"), ExportOptions(max_batch=1)
    return export_small(Small(aux=False).eval(), folder, options=options).path


@pytest.mark.parametrize("checkpoint", [None, Path("weights.pt")])
def test_a_network_without_a_checkpoint_is_refused(
    checkpoint: Path | None, of_a_user: Path
) -> None:
    with pytest.raises(EngineError, match=r": .*no checkpoint"):
        engine(of_a_user, via="torch-tensorrt", checkpoint=checkpoint)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_bundle_in_another_precision_than_the_program_is_refused(precision: str) -> None:
    bundle: Any = SimpleNamespace(path="bundle", manifest=SimpleNamespace(precision=precision))
    with pytest.raises(EngineError, match=precision):
        build_from_program(bundle, lambda: pytest.fail("captured"), PROFILE, 1)


def test_what_is_missing_is_one_line(
    branched: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(RuntimeUnavailableError, match=r"\.\[torch-tensorrt\]"):
        build(branched)


def test_an_operator_without_a_converter_is_named(
    branched: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(*_: object, **__: object) -> bytes:
        try:
            raise RuntimeError(
                "Conversion of function torch._ops.aten.aten::roll not currently supported!\n\nx"
            )
        except RuntimeError as error:
            raise RuntimeError(
                "Conversion of module GraphModule(\n  (conv1): Module()\n)"
            ) from error

    dynamo = SimpleNamespace(convert_exported_program_to_serialized_trt_engine=convert)
    library = SimpleNamespace(Input=lambda **_: None, dynamo=dynamo)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", library)
    with pytest.raises(EngineError, match=r"RuntimeError: .*aten::roll"):
        build(branched)
