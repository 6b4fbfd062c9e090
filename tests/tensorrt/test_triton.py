"""The Triton model repository parses with Triton's own schema and is written atomically."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from typer.testing import CliRunner

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.cli.app import app
from sopdeploy.errors import BundleError
from sopdeploy_export.triton import TritonOptions, write_triton
from tests.tensorrt.networks import CLASSES, SIDE, some_images, write

# The used part of Triton's model_config.proto: the fields of each message; * is repeated.
SCHEMA = {
    "ModelConfig": "string name, string backend, int32 max_batch_size, ModelInput* input, "
    "ModelOutput* output, ModelInstanceGroup* instance_group, ModelOptimizationPolicy optimization, "
    "ModelDynamicBatching dynamic_batching, ModelWarmup* model_warmup, Parameter* parameters",
    "ModelOptimizationPolicy": "ExecutionAccelerators execution_accelerators",
    "ExecutionAccelerators": "Accelerator* gpu_execution_accelerator",
    "Accelerator": "string name, AcceleratorParameter* parameters",
    "AcceleratorParameter": "string key, string value",
    "ModelInput": "string name, DataType data_type, int64* dims",
    "ModelOutput": "string name, DataType data_type, int64* dims, string label_filename",
    "ModelInstanceGroup": "int32 count, Kind kind",
    "ModelDynamicBatching": "int32* preferred_batch_size, uint64 max_queue_delay_microseconds, "
    "ModelQueuePolicy default_queue_policy",
    "ModelQueuePolicy": "TimeoutAction timeout_action, uint64 default_timeout_microseconds, "
    "bool allow_timeout_override, uint32 max_queue_size",
    "ModelWarmup": "string name, uint32 batch_size, Inputs* inputs",
    "Inputs": "string key, WarmupInput value",
    "WarmupInput": "DataType data_type, int64* dims, string input_data_file",
    "Parameter": "string key, ModelParameter value",
    "ModelParameter": "string string_value",
}
ENUMS = {
    "DataType": ["TYPE_INVALID", "TYPE_UINT8", "TYPE_FP32", "TYPE_INT64"],
    "Kind": ["KIND_AUTO", "KIND_GPU", "KIND_CPU"],
    "TimeoutAction": ["REJECT", "DELAY"],
}


def schema() -> Any:
    """Create the message class ModelConfig from SCHEMA."""
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="t", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in SCHEMA.items():
        message = file.message_type.add(name=name)
        for number, declaration in enumerate(fields.split(", "), 1):
            kind, field = declaration.split()
            label = kinds.LABEL_REPEATED if kind.endswith("*") else kinds.LABEL_OPTIONAL
            kind = kind.rstrip("*")
            added = message.field.add(name=field, number=number, label=label)
            if kind in SCHEMA or kind in ENUMS:
                added.type = kinds.TYPE_MESSAGE if kind in SCHEMA else kinds.TYPE_ENUM
                added.type_name = f".t.{kind}"
            else:
                added.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.ModelConfig"))


def config_of(bundle: Bundle, folder: Path, **options: int) -> Any:
    written = write_triton(bundle, folder / "models", TritonOptions(**options))
    return text_format.Parse((written.path / "config.pbtxt").read_text(), schema()())


def test_the_config_matches_the_manifest_and_the_files_the_bundle(bundle: Bundle, tmp_path: Path) -> None:
    config = config_of(bundle, tmp_path)
    assert (config.name, config.backend, config.max_batch_size) == (bundle.name, "onnxruntime", 16)
    assert [(t.name, t.data_type, list(t.dims)) for t in config.input] == [("images", 1, [SIDE, SIDE, 3])]
    outputs = [(t.name, list(t.dims), t.label_filename) for t in config.output]
    assert outputs == [("logits", [CLASSES], "labels.txt")]
    assert {p.key: p.value.string_value for p in config.parameters}["sopdeploy_bundle"] == bundle.name
    assert [warm.batch_size for warm in config.model_warmup] == [1, 4, 16]
    written = write_triton(bundle, tmp_path / "models")
    value = config.model_warmup[0].inputs[0].value
    raw = (written.path / "warmup" / value.input_data_file).read_bytes()
    assert np.frombuffer(raw, np.uint8).reshape(value.dims).tolist() == some_images()[0].tolist()
    assert written.files == ("1/model.onnx", "config.pbtxt", "labels.txt", "warmup/image")
    assert (written.path / "1" / "model.onnx").read_bytes() == bundle.onnx.read_bytes()
    assert (written.path / "labels.txt").read_text().splitlines() == list(bundle.labels)
    for name in written.files:
        assert str(tmp_path).encode() not in (written.path / name).read_bytes()


def test_requests_are_batched_and_time_out_in_the_queue(bundle: Bundle, tmp_path: Path) -> None:
    config = config_of(
        bundle, tmp_path, max_queue_delay=500, timeout=2_000_000, max_queue_size=7, instances=2
    )
    batching, policy = config.dynamic_batching, config.dynamic_batching.default_queue_policy
    assert list(batching.preferred_batch_size) == [4, 16]
    assert batching.max_queue_delay_microseconds == 500
    timeout = (policy.timeout_action, policy.default_timeout_microseconds, policy.max_queue_size)
    assert timeout == (0, 2_000_000, 7)
    assert policy.allow_timeout_override
    (group,) = config.instance_group
    assert (group.count, group.kind) == (2, 0)  # on every GPU, or on the CPU


def test_fp32_is_not_computed_in_tf32_and_no_batch_size_is_measured_first(
    bundle: Bundle, tmp_path: Path
) -> None:
    config = config_of(bundle, tmp_path)
    (cuda,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert (cuda.name, [(p.key, p.value) for p in cuda.parameters]) == ("cuda", [("use_tf32", "0")])
    assert {p.key: p.value.string_value for p in config.parameters}["cudnn_conv_algo_search"] == "1"


def test_a_bundle_for_single_images_is_not_batched(tmp_path: Path) -> None:
    config = config_of(
        write(tmp_path, batch=BatchRange(minimum=1, optimum=1, maximum=1)), tmp_path / "models"
    )
    assert not config.HasField("dynamic_batching")
    assert [warm.batch_size for warm in config.model_warmup] == [1]


def test_a_bundle_that_triton_cannot_serve_is_rejected(bundle: Bundle, tmp_path: Path) -> None:
    pairs = write(tmp_path / "pairs", batch=BatchRange(minimum=2, optimum=2, maximum=4))
    broken = replace(bundle, labels=("a", "b\nc", "d", "e", "f"))
    for refused, message in ((pairs, "Triton sends single"), (broken, r"'b\\nc' does not fit on a line")):
        with pytest.raises(BundleError, match=message):
            write_triton(refused, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_writing_twice_is_idempotent_and_other_content_is_kept(bundle: Bundle, tmp_path: Path) -> None:
    models = tmp_path / "models"
    first = write_triton(bundle, models)
    assert write_triton(bundle, models) == first
    (first.path / "labels.txt").write_text("mine\n")
    with pytest.raises(BundleError, match="exists with other content"):
        write_triton(bundle, models)
    assert (first.path / "labels.txt").read_text() == "mine\n"
    assert [path.name for path in models.iterdir()] == [bundle.name]


def test_the_command_prints_what_it_wrote(bundle: Bundle, tmp_path: Path) -> None:
    arguments = ["triton", str(bundle.path), str(tmp_path / "models")]
    found = CliRunner().invoke(app, arguments)
    assert (found.exit_code, found.stderr) == (0, "")
    assert "batches of 1 to 16" in found.stdout
    again = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert again["max_batch"] == 16
