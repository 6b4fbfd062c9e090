"""Lists that repeat a list: both sides are compared, so that neither can change alone."""

import ast
from collections.abc import Iterable
from typing import get_args, get_type_hints

from sopdeploy.decision import Answer, AnswerFields
from sopdeploy.http_api import Classes
from sopdeploy.layers.isqrt_cov import Prenorm
from sopdeploy_commands.bulk.classifier import COLUMNS, ImageRow
from sopdeploy_commands.bundles.predict import FilePrediction
from sopdeploy_service.decoding import child
from tests.support.rooms import PACKAGES, ROOT

IMAGES = PACKAGES["sopdeploy"] / "images"
DECODING = {"warnings"}  # of the image, not of the answer
ON_REQUEST = {"explanation"}  # not of `classify`, which writes columns


SHARE = 0.75  # of the words; a list with fewer is another one
# Lists of some words of a `Literal`, for a reason of their own: the stages of another family, and
# what a test leaves out because it has a case of its own.
PARTS = [
    {"layer1", "layer2", "layer3"},
    {"pad", "squash", "squash-crop"},
    {"kept", "dropped", "failed"},
    {"unknown", "low_margin", "sample"},
]


def words(elements: Iterable[ast.expr]) -> set[str]:
    """Return *elements* if all are texts, or tuples that begin with one; else nothing."""
    texts = [
        one.elts[0] if isinstance(one, ast.Tuple | ast.List) and one.elts else one
        for one in elements
    ]
    if not all(isinstance(one, ast.Constant) and isinstance(one.value, str) for one in texts):
        return set()
    return {str(one.value) for one in texts if isinstance(one, ast.Constant)}


def test_a_list_that_repeats_a_literal_has_all_its_words() -> None:
    """A word that is added to a `Literal` or to a list of its words is in both, in rooms and tests."""
    folders = (*PACKAGES.values(), ROOT / "tests")
    texts = {
        path: path.read_text(encoding="utf-8")
        for folder in folders
        for path in folder.rglob("*.py")
    }

    # The literals of three words and more
    literals: dict[str, set[str]] = {}
    options: set[ast.AST] = set()
    trees = {path: ast.parse(text) for path, text in texts.items() if "Literal[" in text}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Subscript) and getattr(node.value, "id", "") == "Literal":
                elements = node.slice.elts if isinstance(node.slice, ast.Tuple) else []
                literals[f"{path}:{node.lineno}"] = words(elements)
                options.add(node.slice)
    literals = {place: literal for place, literal in literals.items() if len(literal) > 2}
    assert len(literals) > 20

    # The lists of nearly the same words, in files that have these words
    differences = []
    for path, text in texts.items():
        nearby = {
            other: literal
            for other, literal in literals.items()
            if sum(f'"{word}"' in text for word in literal) >= SHARE * len(literal)
        }
        if not nearby:
            continue
        tree = trees[path] if path in trees else ast.parse(text)
        for node in ast.walk(tree):
            listed: set[str] = set()
            if isinstance(node, ast.Dict):
                listed = words(key for key in node.keys if key is not None)
            elif isinstance(node, ast.Set | ast.Tuple | ast.List) and node not in options:
                listed = words(node.elts)
            if len(listed) < 3 or listed in PARTS:
                continue
            for other, literal in nearby.items():
                is_alike = len(literal & listed) >= SHARE * max(len(literal), len(listed))
                if is_alike and listed != literal:
                    place = f"{path}:{getattr(node, 'lineno', 0)}"
                    differences.append(f"{place} and {other}: {sorted(listed ^ literal)}")
    assert differences == []


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
