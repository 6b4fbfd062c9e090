"""The Triton model repository parses with Triton's own schema and is written atomically."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from typer.testing import CliRunner

from sopdeploy.bundle.decision import Calibration, Decision
from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.graph_properties import GraphProperties
from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import BundleError
from sopdeploy_commands.app import app
from sopdeploy_export.triton import Model, write_triton
from tests.support.service import deciding
from tests.tensorrt.networks import CLASSES, SIDE, some_images, write


def load_schema() -> Any:
    """Load Triton's messages from its client without the client's package, which needs grpc."""
    (folder,) = importlib.util.find_spec("tritonclient").submodule_search_locations
    path = Path(folder) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCHEMA = load_schema()


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write(tmp_path)


def config_of(bundle: Bundle, folder: Path) -> Any:
    written = write_triton(Model.of_bundle(bundle), folder / "models")
    return text_format.Parse((written / "config.pbtxt").read_text(), SCHEMA.ModelConfig())


def test_clients_are_told_the_temperature_that_they_must_divide_by(
    bundle: Bundle, tmp_path: Path
) -> None:
    calibration = Calibration(
        temperature=0.3, loss_before=1, loss_after=0.5, num_images=9, estimated_on="held-out"
    )
    decision = Decision(calibration=calibration)

    for rules, expected in ((decision, ""), (decision.for_trained_logits(), "0.3")):
        changed = deciding(bundle, rules)
        config = config_of(changed, tmp_path / expected)
        assert config.parameters["sopdeploy_temperature"].string_value == expected


def test_the_config_matches_the_manifest_and_the_files_the_bundle(
    bundle: Bundle, tmp_path: Path
) -> None:
    config = config_of(bundle, tmp_path)
    assert (config.name, config.backend, config.max_batch_size) == (
        bundle.name,
        "onnxruntime",
        16,
    )
    assert [(t.name, t.data_type, list(t.dims)) for t in config.input] == [
        ("images", SCHEMA.TYPE_UINT8, [SIDE, SIDE, 3])
    ]

    outputs = [(t.name, list(t.dims), t.label_filename) for t in config.output]
    assert outputs == [("logits", [CLASSES], "labels.txt")]
    assert config.parameters["sopdeploy_bundle"].string_value == bundle.name
    assert [warm.batch_size for warm in config.model_warmup] == [1, 4, 16]

    (cuda,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert (cuda.name, dict(cuda.parameters)) == ("cuda", {"use_tf32": "0"})

    written = write_triton(Model.of_bundle(bundle), tmp_path / "models")
    value = config.model_warmup[0].inputs["images"]
    raw = (written / "warmup" / value.input_data_file).read_bytes()

    assert (
        np.frombuffer(raw, np.uint8).reshape(value.dims).tolist() == some_images()[0].tolist()
    )

    files = {
        path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()
    }
    assert files == {"1/model.onnx", "config.pbtxt", "labels.txt", "warmup/image"}
    assert (written / "1" / "model.onnx").read_bytes() == bundle.onnx.read()
    assert (written / "labels.txt").read_text().splitlines() == list(bundle.labels)
    for name in files:
        assert str(tmp_path).encode() not in (written / name).read_bytes()


def test_requests_are_batched_and_time_out_in_the_queue(bundle: Bundle, tmp_path: Path) -> None:
    config = config_of(bundle, tmp_path)
    batching, policy = config.dynamic_batching, config.dynamic_batching.default_queue_policy
    assert list(batching.preferred_batch_size) == [4, 16]
    assert batching.max_queue_delay_microseconds == 1000

    timeout = (
        policy.timeout_action,
        policy.default_timeout_microseconds,
        policy.max_queue_size,
    )
    assert timeout == (0, 1_000_000, 256)
    assert policy.allow_timeout_override

    (group,) = config.instance_group
    assert (group.count, group.kind) == (1, 0)  # on every GPU, or on the CPU

    single = BatchRange(minimum=1, optimum=1, maximum=1)
    config = config_of(write(tmp_path / "single", batch=single), tmp_path / "models")
    assert not config.HasField("dynamic_batching")
    assert [warm.batch_size for warm in config.model_warmup] == [1]

    # Triton adds no batch axis, which a graph for one image does not have
    image = [1, SIDE, SIDE, 3]
    shapes = [list(tensor.dims) for tensor in (*config.input, *config.output)]
    assert (config.max_batch_size, shapes) == (0, [image, [1, CLASSES]])
    assert list(config.model_warmup[0].inputs["images"].dims) == image


def test_a_bundle_that_triton_cannot_serve_is_rejected(bundle: Bundle, tmp_path: Path) -> None:
    pairs = write(tmp_path / "pairs", batch=BatchRange(minimum=2, optimum=2, maximum=4))
    broken = replace(bundle, labels=("a", "b\nc", "d", "e", "f"))
    for refused, message in (
        (pairs, "also sends single"),
        (broken, r"'b\\nc' does not fit on a line"),
    ):
        with pytest.raises(BundleError, match=message):
            write_triton(Model.of_bundle(refused), tmp_path / "models")

    assert not (tmp_path / "models").exists()


def test_runs_and_bundles_are_not_a_repository(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "runs" / "hats-1").mkdir(parents=True)
    (tmp_path / "runs" / "hats-1" / "best.pt").write_bytes(b"")
    for folder in ("runs", "runs/hats-1"):
        words = ["triton", str(bundle.path), str(tmp_path / folder)]
        command = CliRunner().invoke(app, words)
        assert (command.exit_code, command.stderr.count("\n")) == (2, 1)
        assert f"{tmp_path / folder}: " in command.stderr
    assert [path.name for path in (tmp_path / "runs").rglob("*")] == ["hats-1", "best.pt"]


def test_writing_twice_is_idempotent_and_other_content_is_kept(
    bundle: Bundle, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    first = write_triton(Model.of_bundle(bundle), models)
    command = CliRunner().invoke(app, ["triton", str(bundle.path), str(models)])

    assert (command.exit_code, command.stderr) == (0, "")
    assert "batches of 1 to 16" in command.stdout
    assert write_triton(Model.of_bundle(bundle), models) == first

    (first / "labels.txt").write_text("mine\n")
    with pytest.raises(BundleError, match="other content"):
        write_triton(Model.of_bundle(bundle), models)
    assert (first / "labels.txt").read_text() == "mine\n"
    assert [path.name for path in models.iterdir()] == [bundle.name]


def write_alone(bundle: Bundle, file: Path, **texts: str | None) -> Path:
    """Write the graph of *bundle* to *file* as the export does, with some *texts* in place of its own."""
    manifest = bundle.manifest
    properties = GraphProperties(
        sopdeploy="1.0",
        project="alone",
        labels=bundle.labels,
        preprocess=manifest.preprocess,
        batch=manifest.batch,
        precision=manifest.precision,
    )
    graph = onnx.ModelProto.FromString(bundle.onnx.read())
    changed = {**properties.to_texts(), **texts}
    onnx.helper.set_model_props(
        graph, {key: text for key, text in changed.items() if text is not None}
    )
    file.write_bytes(graph.SerializeToString())
    return file


def test_a_graph_that_left_its_bundle_keeps_its_classes(bundle: Bundle, tmp_path: Path) -> None:
    file = write_alone(bundle, tmp_path / "moved.onnx", temperature="0.25")
    command = CliRunner().invoke(app, ["triton", str(file), str(tmp_path / "models")])
    assert command.exit_code == 0, command.output

    (written,) = (tmp_path / "models").glob("alone-*")
    assert (written / "labels.txt").read_text().splitlines() == list(bundle.labels)
    assert (written / "1" / "model.onnx").read_bytes() == file.read_bytes()
    assert (written / "warmup" / "image").stat().st_size == SIDE * SIDE * 3
    config = text_format.Parse((written / "config.pbtxt").read_text(), SCHEMA.ModelConfig())
    expected = config_of(bundle, tmp_path)
    for field in ("max_batch_size", "input", "output", "dynamic_batching"):
        assert getattr(config, field) == getattr(expected, field)
    assert config.parameters["sopdeploy_temperature"].string_value == "0.25"


@pytest.mark.parametrize(
    "texts",
    [
        {"sopdeploy": None},
        {"labels": None},
        {"labels": "[1]"},
        {"batch": "{"},
        {"project": '"../x"'},
    ],
)
def test_a_graph_that_does_not_say_what_it_is_is_refused(
    texts: dict[str, str | None], bundle: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(BundleError):
        Model.of_file(write_alone(bundle, tmp_path / "a.onnx", **texts))


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "text.onnx"
    with pytest.raises(BundleError):
        Model.of_file(file)
    file.write_bytes(b"\x08text")
    command = CliRunner().invoke(app, ["triton", str(file), str(tmp_path / "models")])
    assert (command.exit_code, command.stderr.count("\n")) == (2, 1)
    assert not (tmp_path / "models").exists()
