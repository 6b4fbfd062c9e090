"""An answer of the Open Inference Protocol gives back every bit of the outputs, as JSON and as binary."""

import struct

import numpy as np
import orjson
import pytest

from sopdeploy_service.api.v2.metadata import Tensor
from sopdeploy_service.api.v2.request import Wanted
from sopdeploy_service.api.v2.response import HEADER_LENGTH, classify, stacked, write_answer
from sopdeploy_service.http.problems import RejectedError
from sopdeploy_service.inference.model_statistics import ModelStatistics, Sum
from sopdeploy_service.inference.results import DEADLINE, ENGINE_FAILED, NONFINITE, Prediction, Ranking

LOGITS = Tensor("logits", "FP32", (-1, 3))
GATE = Tensor("gate", "FP32", (-1, 2))
VALUES = {
    "logits": np.array([[0.1, 1e-7, -3.4e38], [2, 2, 5]], dtype=np.float32),
    "gate": np.array([[1 / 3, 1], [0, 2 / 3]], dtype=np.float32),
}
LABELS = {"logits": ("ant", "bee: the big one", "çat")}
HEAD = {"model_name": "tiny", "model_version": "abc"}


def taken_apart(body: bytes, headers: dict[str, str]) -> tuple[dict, bytes]:
    length = int(headers.get(HEADER_LENGTH, len(body)))
    return orjson.loads(body[:length]), body[length:]


def test_json_numbers_read_back_as_the_same_float32():
    body, headers = write_answer(HEAD, VALUES, [Wanted(LOGITS, False, 0)], LABELS)
    text, rest = taken_apart(body, headers)
    assert headers == {"Content-Type": "application/json"}
    assert rest == b""
    (output,) = text.pop("outputs")
    assert text == HEAD
    assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [2, 3])
    assert np.array_equal(np.float32(output["data"]), VALUES["logits"].ravel())


def test_binary_outputs_follow_the_json_in_their_order():
    body, headers = write_answer(HEAD, VALUES, [Wanted(GATE, True, 0), Wanted(LOGITS, True, 0)], LABELS)
    text, rest = taken_apart(body, headers)
    sizes = [output["parameters"]["binary_data_size"] for output in text["outputs"]]
    assert headers["Content-Type"] == "application/octet-stream"
    assert sizes == [16, 24]
    assert rest == VALUES["gate"].tobytes() + VALUES["logits"].tobytes()


def test_json_and_binary_outputs_mix():
    body, headers = write_answer(HEAD, VALUES, [Wanted(GATE, False, 0), Wanted(LOGITS, True, 0)], LABELS)
    text, rest = taken_apart(body, headers)
    assert "data" in text["outputs"][0]
    assert "data" not in text["outputs"][1]
    assert rest == VALUES["logits"].tobytes()


def test_classes_come_as_value_index_label_and_equal_values_in_the_order_of_the_labels():
    assert classify(VALUES["logits"], 2, LABELS["logits"]) == [
        ["0.1:0:ant", "1e-07:1:bee: the big one"],
        ["5.0:2:çat", "2.0:0:ant"],
    ]


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (2, 2), (1000, 2)])
def test_an_output_without_labels_gives_value_and_index_and_no_more_classes_than_it_has(asked, given):
    body, headers = write_answer(HEAD, VALUES, [Wanted(GATE, False, asked)], LABELS)
    (output,) = taken_apart(body, headers)[0]["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, given])
    assert output["data"][0] == "1.0:1"


def test_classes_as_binary_have_their_lengths_in_bytes_before_them():
    body, headers = write_answer(HEAD, VALUES, [Wanted(LOGITS, True, 1)], LABELS)
    text, rest = taken_apart(body, headers)
    texts = [b"0.1:0:ant", "5.0:2:çat".encode()]
    assert rest == b"".join(struct.pack("<I", len(raw)) + raw for raw in texts)
    assert text["outputs"][0]["parameters"] == {"binary_data_size": len(rest)}


def answered(place: int, batch: int) -> Prediction:
    outputs = {name: values[place] for name, values in VALUES.items()}
    return Prediction(outputs, 0.1, 0.4, batch, Ranking([]), place)


def test_the_outputs_of_the_images_are_stacked_by_name():
    found = stacked([answered(0, 2), answered(1, 2)])
    assert list(found) == ["logits", "gate"]
    assert all(np.array_equal(found[name], VALUES[name]) for name in VALUES)


def test_the_first_refused_image_refuses_the_request_and_is_named():
    with pytest.raises(RejectedError) as caught:
        stacked([answered(0, 1), NONFINITE, ENGINE_FAILED])
    rejection = caught.value.rejection
    assert (rejection.code, rejection.status) == (NONFINITE.code, 500)
    assert rejection.message == f"image 1: {NONFINITE.message}"


def test_the_ledger_counts_requests_by_their_end_and_runs_by_their_size():
    ledger, stages = ModelStatistics(), {"queue": 0.25}
    ledger.note([answered(0, 2), answered(1, 2)], stages, 1.0)
    ledger.note([answered(0, 1)], stages, 0.5)
    ledger.note([answered(0, 1), NONFINITE], stages, 2.0)
    ledger.note(DEADLINE, stages, 4.0)
    assert (ledger.success, ledger.failure) == (Sum(2, 1.5), Sum(2, 6.0))
    assert ledger.stages == {"queue": Sum(2, 0.5)}
    assert ledger.batches == {2: Sum(2, 0.8), 1: Sum(2, 0.8)}
    assert ledger.executions() == {1: Sum(2, 0.8), 2: Sum(1, 0.4)}
