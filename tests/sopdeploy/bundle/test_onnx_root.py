"""The root of an ONNX file: equal for equal graphs, and never of another graph than a runtime reads."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sopdeploy.base.files import GRAPH_DATA
from sopdeploy.bundle.onnx_root import hash_parts, read_model
from sopdeploy.errors import CertificateError


def test_lists_of_parts_never_collide() -> None:
    """The length of text is that of its bytes; with that of its characters, these lists were equal."""
    assert hash_parts("é3", b"A", b"x" * 27) != hash_parts("é".encode(), b"A27:" + b"x" * 27)


NUMBERS: dict[int, list[float]] = {
    TensorProto.FLOAT: [1.5, -2.0],
    TensorProto.BFLOAT16: [1.5, -2.0],
    TensorProto.INT64: [-1, 5],
    TensorProto.BOOL: [True, False],
}


def model_of(weight: onnx.TensorProto) -> onnx.ModelProto:
    nodes = [
        helper.make_node("LeakyRelu", ["x"], ["y"], name="first", alpha=0.5),
        helper.make_node("Concat", ["y", weight.name], ["z"], axis=-1),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])]
    outputs = [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def root(model: onnx.ModelProto) -> str:
    return read_model(model.SerializeToString(deterministic=True))[1]


@pytest.mark.parametrize("dtype", NUMBERS, ids=TensorProto.DataType.Name)
def test_root_does_not_depend_on_how_a_file_stores_numbers(dtype: int) -> None:
    typed = helper.make_tensor("w", dtype, [2], NUMBERS[dtype])
    raw = numpy_helper.from_array(numpy_helper.to_array(typed), "w")
    assert raw.HasField("raw_data")
    assert not typed.HasField("raw_data")
    assert root(model_of(typed)) == root(model_of(raw))

    other = numpy_helper.from_array(numpy_helper.to_array(typed)[::-1].copy(), "w")
    assert root(model_of(other)) != root(model_of(raw))


def plain() -> onnx.ModelProto:
    return model_of(numpy_helper.from_array(np.array([1, 2], np.float32), "w"))


def test_names_and_documentation_do_not_count() -> None:
    model = plain()
    model.graph.node[0].name = model.graph.node[0].doc_string = "other"
    model.graph.node[0].attribute[0].doc_string = "other"
    model.graph.node[0].output[0] = model.graph.node[1].input[0] = "renamed"
    model.metadata_props.add(key="key", value="value")

    assert root(model) == root(plain())


COUNTED: dict[str, Callable[[onnx.ModelProto], object]] = {
    "operator": lambda m: setattr(m.graph.node[0], "op_type", "ThresholdedRelu"),
    "domain": lambda m: setattr(m.graph.node[0], "domain", "com.microsoft"),
    "attribute": lambda m: setattr(m.graph.node[0].attribute[0], "f", 0.25),
    "negative attribute": lambda m: setattr(m.graph.node[1].attribute[0], "i", -2),
    "input type": lambda m: setattr(
        m.graph.input[0].type.tensor_type, "elem_type", TensorProto.DOUBLE
    ),
    "opset": lambda m: setattr(m.opset_import[0], "version", 19),
    "operands": lambda m: m.graph.node[1].input.append("x"),
    "shape": lambda m: m.graph.initializer[0].dims.append(1),
}


@pytest.mark.parametrize("part", COUNTED)
def test_everything_that_is_computed_counts(part: str) -> None:
    model = plain()
    COUNTED[part](model)

    assert root(model) != root(plain())


def outside(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL  # raw_data stays as a decoy


def control_flow(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(
        helper.make_attribute("then_branch", onnx.GraphProto())
    )


OTHER = numpy_helper.from_array(np.array([7, 8], np.float32), "w")


def sparse(model: onnx.ModelProto) -> None:
    indices = numpy_helper.from_array(np.arange(2), "indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(OTHER, indices, [2]))


def constant_with_two_values(model: onnx.ModelProto) -> None:
    """ONNX Runtime reads the list, because of the type."""
    node = helper.make_node("Constant", [], ["w"], value=model.graph.initializer.pop())
    node.attribute[0].type = onnx.AttributeProto.FLOATS
    node.attribute[0].floats.extend([7, 8])
    model.graph.node.insert(0, node)


REJECTED: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "a weight with two definitions": (
        lambda m: m.graph.initializer.insert(0, OTHER),
        "'w' is defined twice",
    ),
    "a constant that replaces a weight": (
        lambda m: m.graph.node.append(helper.make_node("Constant", [], ["w"], value=OTHER)),
        "'w' is defined twice",
    ),
    "a sparse weight that replaces a weight": (sparse, "sparse weights"),
    "a constant with two values": (constant_with_two_values, "Constant"),
    "weights in another file": (outside, "another file"),
    "a weight that is stored twice": (
        lambda m: m.graph.initializer[0].float_data.extend([7, 8]),
        "w is stored twice",
    ),
    "a weight without numbers": (
        lambda m: m.graph.initializer[0].ClearField("raw_data"),
        "has no values",
    ),
    "control flow": (control_flow, "LeakyRelu contains a subgraph"),
    "its own operator": (lambda m: m.functions.add(name="Relu"), "own operators"),
    "an unknown operand": (lambda m: m.graph.node[0].input.append("q"), "complete ONNX model"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_model_without_a_root_is_rejected(case: str) -> None:
    change, message = REJECTED[case]
    model = plain()
    change(model)

    with pytest.raises(CertificateError, match=message):
        root(model)


def field_set_twice() -> bytes:
    """A runtime reads only the last value, here `Relu`."""
    content = plain().SerializeToString()
    twice = content.replace(b"\x22\x09LeakyRelu", b"\x22\x03Lea\x22\x04Relu")
    assert onnx.load_model_from_string(twice).graph.node[0].op_type == "Relu"
    return twice


def field_number_that_overflows() -> bytes:
    """ONNX Runtime drops the upper bits and merges the second graph, here another weight, into the first."""
    graph = onnx.GraphProto(initializer=[OTHER]).SerializeToString()
    return plain().SerializeToString() + b"\xba\x80\x80\x80\x10" + bytes([len(graph)]) + graph


OTHER_BYTES = (field_set_twice, field_number_that_overflows)


@pytest.mark.parametrize("content", OTHER_BYTES, ids=lambda function: function.__name__)
def test_file_that_is_not_the_serialization_of_its_model_has_no_root(
    content: Callable[[], bytes],
) -> None:
    with pytest.raises(CertificateError, match=r"ONNX|repeated fields"):
        read_model(content())


def place(tensor: onnx.TensorProto, **entries: object) -> None:
    """Move the numbers of *tensor* out of the graph, to where *entries* say."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))


def with_weights_beside() -> tuple[onnx.ModelProto, bytes]:
    """Return the graph of `plain` with one more weight, both of them in a file, and the file."""
    model = plain()
    model.graph.initializer.append(OTHER)
    model.graph.initializer[1].name = "v"
    model.graph.node[1].input.append("v")
    first, second = (numpy_helper.to_array(each).tobytes() for each in model.graph.initializer)

    place(model.graph.initializer[0], location=GRAPH_DATA, offset=0, length=8)
    place(model.graph.initializer[1], location=GRAPH_DATA, offset=64, length=8)
    return model, first + bytes(56) + second


def entry(model: onnx.ModelProto, position: int, value: str) -> None:
    model.graph.initializer[1].external_data[position].value = value


def test_the_root_does_not_depend_on_the_file_that_stores_the_weights() -> None:
    model, weights = with_weights_beside()
    whole = plain()
    whole.graph.initializer.append(OTHER)
    whole.graph.initializer[1].name = "v"
    whole.graph.node[1].input.append("v")
    content = model.SerializeToString(deterministic=True)

    assert read_model(content, memoryview(weights))[1] == root(whole)


WRONGLY_PLACED: dict[str, tuple[Callable[[onnx.ModelProto], object], bytes, str]] = {
    "in another file": (lambda m: entry(m, 0, "/etc/hostname"), b"", "another file"),
    "over another weight": (lambda m: entry(m, 1, "0"), b"", "at its place"),
    "with another length": (lambda m: entry(m, 2, "4"), b"", "at its place"),
    "before the file": (
        lambda m: (m.graph.initializer[1].dims.__setitem__(0, -2), entry(m, 2, "-8")),
        b"",
        "at its place",
    ),
    "of an unknown type": (
        lambda m: setattr(m.graph.initializer[1], "data_type", 99),
        b"",
        "unknown type",
    ),
    "with a checksum": (
        lambda m: m.graph.initializer[1].external_data.add(key="checksum", value="0"),
        b"",
        "at its place",
    ),
    "in the graph, too": (
        lambda m: m.graph.initializer[1].float_data.extend([1, 2]),
        b"",
        "is stored twice",
    ),
    "with bytes behind it": (lambda _: None, b"abcd", "4 bytes"),
    "with bytes before it": (lambda _: None, b"gap", "before the weight"),
    "after the end": (lambda _: None, b"short", "ends before"),
}


@pytest.mark.parametrize("case", WRONGLY_PLACED)
def test_weights_in_a_file_can_be_read_in_one_way_only(case: str) -> None:
    change, changed, message = WRONGLY_PLACED[case]
    model, weights = with_weights_beside()
    change(model)
    if changed == b"gap":
        weights = weights[:8] + b"x" + weights[9:]
    elif changed == b"short":
        weights = weights[:-1]
    else:
        weights += changed

    with pytest.raises(CertificateError, match=message):
        read_model(model.SerializeToString(deterministic=True), memoryview(weights))
