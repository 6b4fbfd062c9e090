"""Lists that repeat a list: both sides are compared, so that neither can change alone."""

import ast
from pathlib import Path
from typing import get_args, get_type_hints

from sopdeploy.decision import Answer, AnswerFields
from sopdeploy.http_api import Classes
from sopdeploy.layers.isqrt_cov import Prenorm
from sopdeploy_commands.bulk.classifier import COLUMNS, ImageRow
from sopdeploy_commands.bundles.predict import FilePrediction
from sopdeploy_service.decoding import child

IMAGES = Path(__file__).parents[1] / "sopdeploy" / "images"
DECODING = {"warnings"}  # of the image, not of the answer
ON_REQUEST = {"explanation"}  # not of `classify`, which writes columns


def test_an_answer_has_the_same_fields_everywhere() -> None:
    fields = set(Classes.model_fields)
    ranked = {"classes" if name == "ranked" else name for name in Answer._fields}
    assert ranked == set(AnswerFields.__annotations__) == fields - DECODING
    assert fields <= set(FilePrediction.model_fields)
    assert fields - ON_REQUEST <= set(COLUMNS)
    assert set(COLUMNS) | {"logits", "features"} == set(get_type_hints(ImageRow))


def test_a_decoder_can_reply_with_every_error_of_an_image() -> None:
    raised = set()
    for path in IMAGES.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_error = (
                isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ImageError"
            )
            if isinstance(node, ast.Call) and is_error:
                values = {each.arg: ast.literal_eval(each.value) for each in node.keywords}
                raised.add((values["code"], values["status"]))
    assert raised <= set(child.ERRORS)
    assert {code for code, _ in set(child.ERRORS) - raised} == {
        child.TOO_MUCH_MEMORY,
        "decoder_failed",
    }


def test_a_decoder_can_reply_with_every_warning() -> None:
    tree = ast.parse((IMAGES / "pixels.py").read_text(encoding="utf-8"))
    [changes] = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "conversions"
    ]
    assert isinstance(changes, ast.Dict)
    names = {ast.literal_eval(key) for key in changes.keys if key is not None}
    assert names | {"first_frame_only"} == set(child.WARNINGS)
    documented = Classes.__doc__ or ""
    assert [name for name in child.WARNINGS if f"`{name}`" not in documented] == []


def test_each_norm_of_a_covariance_has_its_own_gradient() -> None:
    """That of the hand-written backward is compared with the textbook's for each in `numerics`."""
    text = (IMAGES.parent / "layers" / "isqrt_cov.py").read_text(encoding="utf-8")
    for norm in get_args(Prenorm):
        assert text.count(f'config.prenorm == "{norm}"') == 2  # its value, and its derivative
