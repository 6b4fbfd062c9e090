"""Responses of the Open Inference Protocol keep every bit of the outputs, as JSON and as binary."""

import numpy as np
import orjson
import pytest

from sopdeploy_service.api.v2.request import RequestedOutput, Tensor
from sopdeploy_service.api.v2.response import format_response, rank_labels, stack_outputs
from sopdeploy_service.inference.results import INFERENCE_FAILED, NONFINITE, Prediction, RejectedError

LOGITS = Tensor("logits", "FP32", (-1, 3))
GATE = Tensor("gate", "FP32", (-1, 2))
VALUES = {
    "logits": np.array([[0.1, 1e-7, -3.4e38], [2, 2, 5]], dtype=np.float32),
    "gate": np.array([[1 / 3, 1], [0, 2 / 3]], dtype=np.float32),
}
LABELS = {"logits": ("ant", "bee: the big one", "çat")}
HEAD = {"model_name": "tiny", "model_version": "abc"}


def test_json_numbers_are_the_same_float32_when_parsed():
    body, headers = format_response(HEAD, VALUES, [RequestedOutput(LOGITS, False, 0)], LABELS)
    text = orjson.loads(body)
    assert headers == {"Content-Type": "application/json"}
    (output,) = text.pop("outputs")
    assert text == HEAD
    assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [2, 3])
    assert np.array_equal(np.float32(output["data"]), VALUES["logits"].ravel())


def test_classes_are_value_index_label_and_ties_keep_their_order():
    assert rank_labels(VALUES["logits"], 2, LABELS["logits"]) == [
        ["0.1:0:ant", "1e-07:1:bee: the big one"],
        ["5.0:2:çat", "2.0:0:ant"],
    ]


def test_an_output_without_labels_has_value_and_index_of_at_most_its_classes():
    body, _ = format_response(HEAD, VALUES, [RequestedOutput(GATE, False, 1000)], LABELS)
    (output,) = orjson.loads(body)["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2])
    assert output["data"][0] == "1.0:1"


def prediction(index: int, batch: int) -> Prediction:
    outputs = {name: values[index] for name, values in VALUES.items()}
    return Prediction(outputs, 0.1, 0.4, batch, index)


def test_outputs_are_stacked_by_name_or_the_first_rejection_is_raised():
    found = stack_outputs([prediction(0, 2), prediction(1, 2)])
    assert list(found) == ["logits", "gate"]
    assert all(np.array_equal(found[name], VALUES[name]) for name in VALUES)
    with pytest.raises(RejectedError) as caught:
        stack_outputs([prediction(0, 1), NONFINITE, INFERENCE_FAILED])
    reason = caught.value.reason
    assert (reason.code, reason.status) == (NONFINITE.code, 500)
    assert reason.message == f"image 1: {NONFINITE.message}"
