"""A Triton repository that Triton's own schema takes, whole or not at all."""

import json
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

# What the bundle's config uses of Triton's model_config.proto: message: field: (type, repeated)
SCHEMA: dict[str, dict[str, tuple[str, bool]]] = {
    "ModelConfig": {
        "name": ("string", False),
        "backend": ("string", False),
        "max_batch_size": ("int32", False),
        "input": ("ModelInput", True),
        "output": ("ModelOutput", True),
        "instance_group": ("ModelInstanceGroup", True),
        "dynamic_batching": ("ModelDynamicBatching", False),
        "model_warmup": ("ModelWarmup", True),
        "parameters": ("Parameter", True),
    },
    "ModelInput": {"name": ("string", False), "data_type": ("DataType", False), "dims": ("int64", True)},
    "ModelOutput": {
        "name": ("string", False),
        "data_type": ("DataType", False),
        "dims": ("int64", True),
        "label_filename": ("string", False),
    },
    "ModelInstanceGroup": {"count": ("int32", False), "kind": ("Kind", False)},
    "ModelDynamicBatching": {
        "preferred_batch_size": ("int32", True),
        "max_queue_delay_microseconds": ("uint64", False),
        "default_queue_policy": ("ModelQueuePolicy", False),
    },
    "ModelQueuePolicy": {
        "timeout_action": ("TimeoutAction", False),
        "default_timeout_microseconds": ("uint64", False),
        "allow_timeout_override": ("bool", False),
        "max_queue_size": ("uint32", False),
    },
    "ModelWarmup": {"name": ("string", False), "batch_size": ("uint32", False), "inputs": ("Inputs", True)},
    "Inputs": {"key": ("string", False), "value": ("WarmupInput", False)},
    "WarmupInput": {
        "data_type": ("DataType", False),
        "dims": ("int64", True),
        "input_data_file": ("string", False),
    },
    "Parameter": {"key": ("string", False), "value": ("ModelParameter", False)},
    "ModelParameter": {"string_value": ("string", False)},
}
ENUMS = {
    "DataType": ["TYPE_INVALID", "TYPE_UINT8", "TYPE_FP32", "TYPE_INT64"],
    "Kind": ["KIND_AUTO", "KIND_GPU", "KIND_CPU"],
    "TimeoutAction": ["REJECT", "DELAY"],
}


def schema() -> Any:
    """The class of ModelConfig, made of SCHEMA."""
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="t", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in SCHEMA.items():
        message = file.message_type.add(name=name)
        for number, (field, (kind, repeated)) in enumerate(fields.items(), 1):
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            added = message.field.add(name=field, number=number, label=label)
            if kind in SCHEMA or kind in ENUMS:
                added.type = kinds.TYPE_MESSAGE if kind in SCHEMA else kinds.TYPE_ENUM
                added.type_name = f".t.{kind}"
            else:
                added.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.ModelConfig"))


def config_of(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), schema()())


def test_the_config_is_what_the_manifest_says(bundle: Bundle, tmp_path: Path) -> None:
    written = write_triton(bundle, tmp_path / "models")
    config = config_of(written.path)
    assert (config.name, config.backend, config.max_batch_size) == (bundle.name, "onnxruntime", 16)
    assert [(t.name, t.data_type, list(t.dims)) for t in config.input] == [("images", 1, [SIDE, SIDE, 3])]
    assert [(t.name, list(t.dims), t.label_filename) for t in config.output] == [
        ("logits", [CLASSES], "labels.txt")
    ]
    assert {p.key: p.value.string_value for p in config.parameters}["sopdeploy_bundle"] == bundle.name


def test_requests_are_gathered_and_refused_when_they_waited_too_long(bundle: Bundle, tmp_path: Path) -> None:
    options = TritonOptions(max_queue_delay=500, timeout=2_000_000, max_queue_size=7, instances=2)
    config = config_of(write_triton(bundle, tmp_path / "models", options).path)
    batching, policy = config.dynamic_batching, config.dynamic_batching.default_queue_policy
    assert list(batching.preferred_batch_size) == [4, 16]
    assert batching.max_queue_delay_microseconds == 500
    assert (policy.timeout_action, policy.default_timeout_microseconds, policy.max_queue_size) == (
        0,
        2_000_000,
        7,
    )
    assert policy.allow_timeout_override
    assert config.instance_group[0].count == 2


def test_it_is_warm_for_every_batch_size_with_a_real_picture(bundle: Bundle, tmp_path: Path) -> None:
    written = write_triton(bundle, tmp_path / "models")
    config = config_of(written.path)
    assert [warm.batch_size for warm in config.model_warmup] == [1, 4, 16]
    value = config.model_warmup[0].inputs[0].value
    raw = (written.path / "warmup" / value.input_data_file).read_bytes()
    assert np.frombuffer(raw, np.uint8).reshape(value.dims).tolist() == some_images()[0].tolist()


def test_graph_and_labels_are_the_bundles(bundle: Bundle, tmp_path: Path) -> None:
    written = write_triton(bundle, tmp_path / "models")
    assert written.files == ("1/model.onnx", "config.pbtxt", "labels.txt", "warmup/image")
    assert (written.path / "1" / "model.onnx").read_bytes() == bundle.onnx.read_bytes()
    assert (written.path / "labels.txt").read_text().splitlines() == list(bundle.labels)


def test_a_bundle_of_single_images_is_not_gathered(tmp_path: Path) -> None:
    bundle = write(tmp_path, batch=BatchRange(minimum=1, optimum=1, maximum=1))
    config = config_of(write_triton(bundle, tmp_path / "models").path)
    assert not config.HasField("dynamic_batching")
    assert [warm.batch_size for warm in config.model_warmup] == [1]


def test_a_bundle_that_was_not_verified_for_one_image_is_refused(tmp_path: Path) -> None:
    bundle = write(tmp_path, batch=BatchRange(minimum=2, optimum=2, maximum=4))
    with pytest.raises(BundleError, match="Triton sends single images"):
        write_triton(bundle, tmp_path / "models")


def test_written_twice_it_is_one_and_another_content_stays(bundle: Bundle, tmp_path: Path) -> None:
    models = tmp_path / "models"
    first = write_triton(bundle, models)
    assert write_triton(bundle, models) == first
    (first.path / "labels.txt").write_text("mine\n")
    with pytest.raises(BundleError, match="exists with other content"):
        write_triton(bundle, models)
    assert (first.path / "labels.txt").read_text() == "mine\n"
    assert [path.name for path in models.iterdir()] == [bundle.name]


def test_a_class_name_of_two_lines_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    broken = Bundle(path=bundle.path, manifest=bundle.manifest, labels=("a", "b\nc", "d", "e", "f"))
    with pytest.raises(BundleError, match=r"'b\\nc' does not fit on a line"):
        write_triton(broken, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_no_file_names_the_machine(bundle: Bundle, tmp_path: Path) -> None:
    written = write_triton(bundle, tmp_path / "models")
    for name in written.files:
        assert str(tmp_path).encode() not in (written.path / name).read_bytes()


def test_the_verb_tells_what_it_wrote(bundle: Bundle, tmp_path: Path) -> None:
    arguments = ["triton", str(bundle.path), str(tmp_path / "models")]
    found = CliRunner().invoke(app, arguments)
    assert (found.exit_code, found.stderr) == (0, "")
    assert "batches of 1 to 16" in found.stdout
    again = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert again["max_batch"] == 16
