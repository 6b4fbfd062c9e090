"""Lists that repeat a list: both sides are compared, so that neither can change alone."""

import ast
import functools
import importlib
import json
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import get_args

import yaml
from prometheus_client.metrics import MetricWrapperBase

from sopdeploy.base.config import StrictModel
from sopdeploy.bundle.decision import Answer
from sopdeploy.bundle.http_api import Classes, Query
from sopdeploy.data.augment import Augmentation
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.training.settings.recipe import LoopRecipe
from sopdeploy_commands.classify.classifier import COLUMNS
from sopdeploy_commands.classify.run import CsvRow
from sopdeploy_service.decoding import child
from sopdeploy_service.devices import control
from sopdeploy_service.http.api_keys import Key
from sopdeploy_service.keep import KeptResult
from sopdeploy_service.observability.logs import DROPPED
from sopdeploy_service.observability.metrics import Metrics
from tests.docs.reading import blocks_of, text_of
from tests.support.rooms import PACKAGES, ROOT

IMAGES = PACKAGES["sopdeploy"] / "images"
DOCS = ROOT / "docs"
DECODING = {"warnings"}  # of the image, not of the answer
ON_REQUEST = {"explanation"}  # not of `classify`, which writes columns
# Fields of an answer that a spreadsheet shows under another name, or not
NOT_IN_CSV = {"classes", "score", "warnings"}


SHARE = 0.75  # of the words; a list with fewer is another one
STAGES = {"layer1", "layer2", "layer3"}  # of another family than the `Literal` of four


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
            if len(listed) < 3 or listed == STAGES:
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
    assert ranked == fields - DECODING
    assert fields - ON_REQUEST <= set(COLUMNS)

    cells = set(CsvRow.__annotations__)
    assert cells == fields - ON_REQUEST - NOT_IN_CSV | {
        "image",
        "class",
        "probability",
        "error",
    }

    # The page of a server saves the same file.
    script = (PACKAGES["sopdeploy_service"] / "api" / "pages" / "index.js").read_text("utf-8")
    (columns,) = re.findall(r"const columns = (\[.*\]);", script)
    assert ["image", *json.loads(columns), "error"] == [*CsvRow.__annotations__]


def test_an_answer_and_its_row_are_described_with_all_fields() -> None:
    fields = set(Classes.model_fields) - {"classes"}
    described = Classes.__doc__ or ""
    http_page = (DOCS / "http.md").read_text(encoding="utf-8")
    assert {name for name in fields if f"`{name}`" not in described} == set()
    assert {name for name in fields if f'"{name}"' not in http_page} - ON_REQUEST == set()

    columns = first_column("docs/batch.md", "| column | content |")
    assert columns == {*COLUMNS, "logits", "features"}


def first_column(page: str, heading: str) -> set[str]:
    """Return the code in the first column of the table of *page* with the line *heading*."""
    table = text_of(page).partition(heading)[2].partition("\n\n")[0]
    return {
        code
        for row in table.splitlines()
        for code in re.findall(r"`([^`]+)`", row.split(" | ")[0])
    }


def test_the_page_of_recipes_has_every_key_and_its_default() -> None:
    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    named = {key.partition(".")[0] for key in re.findall(r"`([\w.]+)`", page)}
    assert set(LoopRecipe.model_fields) - named == set()

    # A single number or word in the column of values is a default.
    table = page.partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \|", table, re.MULTILINE)
    fields = dict(all_fields(LoopRecipe))
    defaults = {
        key: re.fullmatch(r"`?(\w[\w.]*)`?(?: disables)?", value) for key, value in rows
    }
    different = {
        key: fields[key]
        for key, value in defaults.items()
        if value is not None and key in fields and yaml.safe_load(value[1]) != fields[key]
    }
    assert different == {}
    assert len(defaults) > 10

    # A row with several words has all of them.
    union, _ = get_args(Augmentation)
    kinds = {get_args(one.model_fields["kind"].annotation)[0] for one in get_args(union)}
    assert {*re.findall(r"`([^`]+)`", dict(rows)["augment.kind"])} == kinds


def all_fields(config: type[StrictModel], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the dotted keys of *config* and of the tables that it has by default, with defaults."""
    for name, field in config.model_fields.items():
        default = field.get_default()
        yield prefix + name, default
        if isinstance(default, StrictModel):
            yield from all_fields(type(default), f"{prefix}{name}.")


def test_the_page_of_keys_has_every_field_of_a_key() -> None:
    (example,) = blocks_of(text_of("docs/operations.md"), "toml")
    assert tomllib.loads(example)["key"][0].keys() == Key.model_fields.keys()


def test_the_page_of_limits_has_every_error_of_an_image() -> None:
    page = text_of("docs/settings.md")
    rows = re.findall(r"^\|.*?\| .*?(\d{3}).*? \| (.*?) \|", page, re.MULTILINE)
    named = {
        (code, int(status)) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)
    }

    assert set(child.ERRORS) - named == set()


@functools.cache
def parse_packages() -> dict[str, ast.Module]:
    """Parse each module of the packages."""
    trees = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            tree = ast.parse(path.read_text(encoding="utf-8"))
            trees[".".join((package, *parts)).removesuffix(".__init__")] = tree
    return trees


def attributes_read(tree: ast.AST) -> set[str]:
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


def classes_of(name: str) -> list[type]:
    """List the classes that the module *name* defines."""
    return [
        one
        for one in vars(importlib.import_module(name)).values()
        if isinstance(one, type) and one.__module__ == name
    ]


UNREAD = {
    # of files of earlier versions
    "FewShotResult.strength",
    "Reference.confidences",
    # for people who open the file
    "EngineRecord.build_seconds",
    # for callers from Python
    "TrainingResult.best_epoch",
    "TrainingResult.best_map",
    "TrainingResult.best_top1",
    # compared as a whole
    "EngineKey.builder",
}


def test_something_reads_every_field_of_a_config_file_or_response() -> None:
    """Code reads it, or a page of a server, or people, because a page of the documentation has it."""
    trees = parse_packages()

    # Names that code reads: as attributes, and as texts other than keys of what it writes.
    read = set().union(*map(attributes_read, trees.values()))
    for tree in trees.values():
        written = {
            key
            for node in ast.walk(tree)
            if isinstance(node, ast.Dict)
            for key in node.keys
            if key is not None
        }
        read |= {
            str(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and node not in written
        }

    # Names in pages of servers, and in code of the documentation.
    for folder in PACKAGES.values():
        for path in folder.rglob("*"):
            if path.suffix in (".html", ".js"):
                read |= {*re.findall(r"\w+", path.read_text(encoding="utf-8"))}
    for page in DOCS.rglob("*.md"):
        for code in re.findall(
            r"`[^`\n]+`|```.*?```|^    .*?$", page.read_text(encoding="utf-8"), re.S | re.M
        ):
            read |= {*re.findall(r"\w+", code)}

    fields = {
        f"{config.__name__}.{name}"
        for module, tree in trees.items()
        if any(
            isinstance(node, ast.Name) and node.id == "StrictModel" for node in ast.walk(tree)
        )
        for config in classes_of(module)
        if issubclass(config, StrictModel)
        for name in config.model_fields
    }
    assert len(fields) > 500
    assert {name for name in fields if name.rpartition(".")[2] not in read} == UNREAD


# Arrays of all images, for Python, a column that is read by its name, and facts of the export for --json
FOR_PYTHON = {
    "Evaluation.labels",
    "Evaluation.scores",
    "FilePrediction.score",
    "Promotion.time",
    "Promotion.user",
    "Promotion.refused",
    "Verification.logits",
    "Verification.statements",
}


def test_a_command_shows_every_field_of_its_result() -> None:
    """The module of the command reads it, where its result is defined beside the command."""
    hidden = set()
    num_results = 0
    for module, tree in parse_packages().items():
        is_command = any(
            isinstance(node, ast.FunctionDef)
            and any(ast.unparse(one).startswith("command(") for one in node.decorator_list)
            for node in ast.walk(tree)
        )
        if not is_command:
            continue

        shown = attributes_read(tree)
        for result in classes_of(module):
            names = getattr(result, "model_fields", getattr(result, "__dataclass_fields__", ()))
            num_results += bool(names)
            hidden |= {f"{result.__name__}.{name}" for name in names if name not in shown}

    assert num_results >= 10
    assert hidden == FOR_PYTHON


# Fields that another place adds, that differ by case, or that only earlier versions wrote
NOT_AT_ONCE = {
    "Accuracy.deviation",
    "FewShotResult.strength",
    "FewShotResult.tuning",
    "FewShotResult.unknown",
    "Origin.out_of_fold",
    "PrecisionReport.accuracy",
    "Tuning.first",
    "Tuning.losses",
    "Tuning.second",
    "Tuning.wins",
}


def test_a_file_or_response_that_one_place_makes_gets_each_field_there() -> None:
    trees = parse_packages()
    calls = defaultdict[str, list[set[str | None]]](list)
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
                calls[node.func.id].append({keyword.arg for keyword in node.keywords})

    forgotten = set()
    num_made = 0
    for module in trees:
        for config in classes_of(module):
            makers = calls[config.__name__]
            if not issubclass(config, StrictModel) or len(makers) != 1:
                continue
            (given,) = makers
            if not given or None in given:  # by its defaults or, after `**`, by other names
                continue
            num_made += 1
            constants = {
                name
                for name, field in config.model_fields.items()
                if len(get_args(field.annotation)) == 1
                and field.default in get_args(field.annotation)
            }
            missing = config.model_fields.keys() - given - constants
            forgotten |= {f"{config.__name__}.{name}" for name in missing}

    assert num_made > 50
    assert forgotten - NOT_AT_ONCE == set()


def test_each_parameter_of_a_request_is_read_by_its_endpoint_and_described() -> None:
    trees = parse_packages()
    endpoints = [
        tree for name, tree in trees.items() if name.startswith("sopdeploy_service.api.")
    ]
    read = set().union(*map(attributes_read, endpoints))
    page = (DOCS / "http.md").read_text(encoding="utf-8")

    queries = [one for one in classes_of("sopdeploy.bundle.http_api") if issubclass(one, Query)]
    parameters = {name for query in queries for name in query.model_fields}
    assert len(parameters) > 5
    assert parameters - read == set()
    assert {name for name in parameters if not re.search(rf"[`?&]{name}[`=]", page)} == set()


def test_each_rule_of_preprocessing_is_applied_and_described() -> None:
    applying = [
        tree for name, tree in parse_packages().items() if name.startswith("sopdeploy.images.")
    ]
    read = set().union(*map(attributes_read, applying))
    assert Preprocess.model_fields.keys() - read == set()

    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    described = {*re.findall(r"`preprocess\.(\w+)`", page)}
    assert Preprocess.model_fields.keys() - described == set()


def test_each_message_between_processes_is_sent_and_awaited() -> None:
    kinds = {name for name, value in vars(control).items() if isinstance(value, bytes)}
    assert len(kinds) > 5

    used = set()
    awaited = set()
    for module, tree in parse_packages().items():
        if not module.startswith("sopdeploy_service.devices."):
            continue
        comparisons = [
            part
            for node in ast.walk(tree)
            if isinstance(node, ast.Compare | ast.MatchValue)
            for part in ast.walk(node)
        ]
        for node in ast.walk(tree):
            name = getattr(node, "attr", getattr(node, "id", ""))
            if name in kinds and isinstance(getattr(node, "ctx", None), ast.Load):
                (awaited if node in comparisons else used).add(name)

    assert kinds - used == set()
    assert kinds - awaited == set()


def test_something_counts_every_metric() -> None:
    created = {
        name
        for name, value in vars(Metrics()).items()
        if isinstance(value, MetricWrapperBase) and value is not DROPPED  # which `logs` counts
    }
    assert len(created) > 20

    # The constructor does not count, it creates some with their first labels.
    trees = parse_packages()
    own_module = Metrics.__module__
    (own_class,) = (node for node in trees[own_module].body if isinstance(node, ast.ClassDef))
    constructor, *methods = own_class.body[1:]  # after the docstring
    assert ast.unparse(constructor).startswith("def __init__")
    others = [tree for name, tree in trees.items() if name != own_module]
    counted = set().union(*map(attributes_read, [*methods, *others]))
    assert created - counted == set()


def test_each_label_that_code_gives_is_described_with_its_metric() -> None:
    """Or, of a rejected request, on the pages of errors and settings."""
    errors = text_of("docs/errors.md") + text_of("docs/settings.md")
    rows = re.findall(
        r"^\| `sopdeploy_(\w+)` \|(.*)$", text_of("docs/settings.md"), re.MULTILINE
    )
    described = {name.removesuffix("_total"): text for name, text in rows}

    undescribed = set()
    for tree in parse_packages().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "labels":
                metric = ast.unparse(node.func).removesuffix(".labels").rpartition(".")[2]
                given = {one.value for one in node.args if isinstance(one, ast.Constant)}
                known = described.get(metric, "") + (errors if metric == "rejected" else "")
                undescribed |= {f"{metric}: {word}" for word in given if str(word) not in known}
    assert undescribed == set()
    assert [word for word in get_args(KeptResult) if word not in described["kept_images"]] == []


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
