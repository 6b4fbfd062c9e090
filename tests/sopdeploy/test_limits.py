"""What files of others can cost: every reader has a limit, and twice the input costs at most twice."""

import ast
import codecs
import io
import json
import os
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch

from sopdeploy.base.config import MAX_ITEMS, StrictModel, first_problem, parse_toml, shown
from sopdeploy.base.names import read_labels
from sopdeploy.bundle.golden import GoldenIndex
from sopdeploy.bundle.live import read_log
from sopdeploy.bundle.manifest import Manifest
from sopdeploy.client.client import encode_images
from sopdeploy.data.folders.table import read_label_table
from sopdeploy.data.photos.any_images import open_any_images
from sopdeploy.errors import CheckpointError, ConfigError, SopdeployError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.training.settings.recipe import read_recipe
from sopdeploy.training.settings.recipe_files import parse_override, recipe_text
from sopdeploy.weights.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from sopdeploy.weights.class_names import read_class_names
from sopdeploy.weights.files import check_is_checkpoint, check_is_weights
from sopdeploy.weights.pickled import distinct_values
from sopdeploy.weights.tensor_files import load_plain, read_pytorch
from sopdeploy.weights.timm_files import read_hub_config
from sopdeploy_commands.promote import Promotion
from sopdeploy_commands.rules import read_preprocess
from sopdeploy_service.http.api_keys import read_keys
from sopdeploy_service.runtime.tensorrt_cache import EngineRecord, read_records
from sopdeploy_service.settings import load_settings
from tests.support.rooms import PACKAGES

GIGABYTES = 8 << 30
TWICE = 2.6  # and what hash tables add, which grow in steps
MESSAGE = 4_500  # characters of the longest message


def first_photograph(path: Path) -> bytes:
    return open_any_images(path.parent).read(0)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a recipe": ("recipe.toml", recipe_text),
    "settings": ("settings.toml", load_settings),
    "keys": ("keys.toml", read_keys),
    "class names": ("names.txt", read_class_names),
    "class names in JSON": ("names.json", read_class_names),
    "rules of preprocessing": ("rules.json", lambda path: read_preprocess(str(path))),
    "a table of labels": ("labels.csv", lambda path: read_label_table(path)),
    "a photograph": ("one.jpg", first_photograph),
    "a checkpoint": ("best.pt", read_checkpoint),
    "a checkpoint, before torch is imported": ("best.pt", check_is_checkpoint),
    "weights": ("weights.pth", lambda path: read_pytorch(check_is_weights(path))),
    "an image of the client": ("one.jpg", lambda path: encode_images([path])),
    "the log of promotions": ("promotions.jsonl", lambda path: list(read_log(path.parent))),
}
# These take the file as missing
SKIPPING: dict[str, tuple[str, Callable[[Path], object]]] = {
    "the record of an engine": ("engine.json", lambda path: read_records(path.parent)),
    "the config of a hub": (
        "config.json",
        lambda path: list(read_hub_config(path.with_name("x.bin"))),
    ),
}
SPECIAL: dict[str, Callable[[Path], object]] = {
    "a file with a hole of 8 GB": lambda path: (path.touch(), os.truncate(path, GIGABYTES)),
    "a pipe": os.mkfifo,
    "a device without an end": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "a link to itself": lambda path: path.symlink_to(path.name),
}


def peak_bytes(run: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("reader", READERS)
def test_a_reader_refuses_a_file_without_an_end_and_names_it(
    tmp_path: Path, reader: str, special: str
) -> None:
    name, read = READERS[reader]
    path = tmp_path / name
    SPECIAL[special](path)

    def refused() -> None:
        with pytest.raises(SopdeployError) as caught:
            read(path)
        message = str(caught.value)
        assert str(path) in message or (str(tmp_path) in message and special == "a folder")
        assert "\n" not in message

    assert peak_bytes(refused) < 4_000_000


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("reader", SKIPPING)
def test_a_reader_skips_a_record_without_an_end(
    tmp_path: Path, reader: str, special: str
) -> None:
    name, read = SKIPPING[reader]
    SPECIAL[special](tmp_path / name)

    assert peak_bytes(lambda: read(tmp_path / name)) < 4_000_000
    assert read(tmp_path / name) == []


# Each builds the worst JSON document of about *n* bytes of its kind.
JSON: dict[str, Callable[[int], bytes]] = {
    "zeros": lambda n: b"[" + b"0," * (n // 2) + b"0]",
    "empty lists": lambda n: b"[" + b"[]," * (n // 3) + b"[]]",
    "levels": lambda n: b"[" * (n // 2) + b"]" * (n // 2),
    "levels without an end": lambda n: b'{"a":' * (n // 5),
    "a long text": lambda n: b'["' + b"x" * n + b'"]',
    "a long number": lambda n: b"[" + b"9" * n + b"]",
    "many keys": lambda n: b"{" + b",".join(b'"%d":0' % i for i in range(n // 8)) + b"}",
    "one key with a long name": lambda n: b'{"' + b"k" * n + b'":0}',
    "many texts": lambda n: json.dumps([str(i) for i in range(n // 8)]).encode(),
    "equal texts": lambda n: b"[" + b'"a",' * (n // 4) + b'"a"]',
    "spaces": lambda n: b" " * n,
}
FIELDS = {Manifest: "outputs", GoldenIndex: "examples", Promotion: "comparison",
          EngineRecord: "key", Preprocess: "mean"}  # fmt: skip


def reject(run: Callable[[], object]) -> None:
    """Run *run*, which raises a `ValueError` of few problems and a short message."""
    with pytest.raises(ValueError, match=r".") as caught:
        run()
    if isinstance(caught.value, pydantic.ValidationError):
        assert caught.value.error_count() <= MAX_ERRORS
        assert len(first_problem(caught.value)) <= MESSAGE
    else:
        assert len(str(caught.value)) <= MESSAGE


MAX_ERRORS = 1_100  # those of missing fields and of a thousand unknown keys


@pytest.mark.slow
@pytest.mark.parametrize("member", JSON)
@pytest.mark.parametrize("model", FIELDS, ids=lambda model: model.__name__)
def test_twice_the_json_costs_at_most_twice_as_much(
    member: str, model: type[StrictModel]
) -> None:
    write = JSON[member]
    parse = Manifest.from_bytes if model is Manifest else model.model_validate_json

    def cost(n: int) -> int:
        inner = write(n)
        documents = (inner, b'{"%s":%s}' % (FIELDS[model].encode(), inner))
        return max(peak_bytes(lambda raw=raw: reject(lambda: parse(raw))) for raw in documents)

    few = cost(30_000)
    many = cost(60_000)
    assert many <= TWICE * few + 20_000
    assert many < 200 * 60_000


@pytest.mark.parametrize("member", JSON)
def test_class_names_in_json_cost_at_most_twice_as_much(member: str) -> None:
    def cost(n: int) -> int:
        raw = JSON[member](n)
        with suppress(ValueError):
            return peak_bytes(lambda: read_labels(raw))
        return peak_bytes(lambda: reject(lambda: read_labels(raw)))

    few = cost(30_000)
    many = cost(60_000)
    assert many <= TWICE * few + 20_000


NOT_READ = {"default", "metadata", "serialization"}  # of a core schema


def lists_of(schema: Any) -> list[Any]:
    """List the schemas of lists, sets and dicts in the core *schema*."""
    found = []
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            found += (
                [part]
                if part.get("type") in ("list", "tuple", "set", "frozenset", "dict")
                else []
            )
            waiting += [value for key, value in part.items() if key not in NOT_READ]
        waiting += part if isinstance(part, list) else []

    return found


def test_every_model_ends_at_the_first_wrong_element_and_limits_lengths() -> None:
    waiting = [StrictModel]
    models = set[type[StrictModel]]()
    while waiting:
        model = waiting.pop()
        models.add(model)
        waiting += model.__subclasses__()

    assert len(models) > 50
    for model in models:
        for schema in lists_of(model.__pydantic_core_schema__):
            assert schema["fail_fast"], model
            assert schema["max_length"] <= MAX_ITEMS, model


VALUES: dict[str, Callable[[int], object]] = {
    "a text": lambda n: "x" * n,
    "a list": lambda n: [0] * n,
    "a dict": lambda n: dict.fromkeys(range(n)),
    "a set": lambda n: set(range(n)),
    "a number": lambda n: 1 << n,
    "a tensor": torch.zeros,
    "lists of one list": lambda n: shared_lists(n.bit_length() * 4),
    "many levels": lambda n: levels(n),
    "bytes": bytes,
}


def shared_lists(count: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(count):
        value = [value, value]
    return value


def levels(count: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(count):
        value = [value]
    return value


@pytest.mark.parametrize("member", VALUES)
def test_a_value_is_cut_before_it_is_written(member: str) -> None:
    value = VALUES[member](300_000)

    assert len(shown(value)) <= 100
    assert peak_bytes(lambda: shown(value)) < 5_000_000  # a set is sorted


TEXTS: dict[str, Callable[[int], str]] = {
    "levels": lambda n: "x = " + "[" * n,
    "levels of keys": lambda n: ".".join("a" * n) + " = 1",
    "an unknown key with a long name": lambda n: "k" * n + " = 1",
    "many unknown keys": lambda n: "\n".join(f"k{i} = 1" for i in range(n // 8)),
    "a long text": lambda n: "epochs = '" + "x" * n + "'",
    "a long number": lambda n: "epochs = " + "9" * n,
    "a long list": lambda n: "epochs = [" + "0," * (n // 2) + "]",
}


@pytest.mark.parametrize("member", TEXTS)
@pytest.mark.parametrize(
    "read", [read_recipe, load_settings, read_keys], ids=lambda read: read.__name__
)
def test_every_wrong_toml_file_is_refused_in_one_short_line(
    tmp_path: Path, read: Callable[[Path], object], member: str
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(TEXTS[member](10_000))

    with pytest.raises(ConfigError) as caught:
        read(path)
    assert len(str(caught.value)) <= MESSAGE
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["a", " a\t", '"a"', "'a.='", '"\\"."'])
def test_a_key_of_many_parts_takes_no_memory(part: str) -> None:
    def refused() -> None:
        for text in (".".join([part] * 2_000) + " = 1", "[" + ".".join([part] * 2_000) + "]"):
            with pytest.raises(ValueError, match="more than 100 levels"):
                parse_toml(text)

    assert peak_bytes(refused) < 1_000_000
    assert parse_toml(".".join([part] * 100) + " = 1")


def test_a_text_of_escaped_quotes_takes_no_quadratic_time() -> None:
    assert parse_toml('x = "' + '\\"' * 200_000 + '"') == {"x": '"' * 200_000}


def test_an_override_with_many_levels_is_a_text() -> None:
    assert parse_override("x=" + "[" * 100_000) == ("x", "[" * 100_000)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The content of a checkpoint file."""
    checkpoint = Checkpoint(
        model="dsop-resnet8",
        config={},
        weights={"a": torch.zeros(1)},
        labels=("ant", "bee"),
        preprocess=Preprocess(),
        training={},
    )
    path = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    write_checkpoint(path, checkpoint)
    return dict(load_plain(path, path.read_bytes()))


class Called:
    """Pickled, it calls *function* with *arguments*."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def shared_tuples(count: int) -> tuple[Any, ...]:
    value: tuple[Any, ...] = ()
    for _ in range(count):
        value = (value, value)
    return value


def own_list() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


META = torch.zeros(3, dtype=torch.int64, device="meta")
ENDLESS = torch.zeros(1, dtype=torch.int64).expand(10**12)
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "labels are shared lists": {"labels": shared_lists(40)},
    "the training is shared lists": {"training": {"x": shared_lists(40)}},
    "many levels": {"training": {"x": levels(200)}},
    "a list of itself": {"training": {"x": own_list()}},
    "a key of shared tuples": {"training": Called(OrderedDict, [[shared_tuples(40), 0]])},
    "memory for a number": {"training": {"x": Called(bytearray, GIGABYTES)}},
    "a codec of quadratic time": {"training": {"x": Called(codecs.encode, "é." * 9, "idna")}},
    "hashes on the device meta": {"image_hashes": META},
    "hashes without memory": {"image_hashes": ENDLESS},
    "a project in another folder": {"project": "../../evil"},
    "a class with a tab": {"labels": ["h\tat", "cat"]},
    "many classes": {"labels": [str(number) for number in range(200_000)]},
    "weights of texts": {"weights": dict.fromkeys(map(str, range(50_000)), "x")},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_wrong_checkpoint_is_refused_in_one_short_line(
    tmp_path: Path, content: dict[str, Any], case: str
) -> None:
    path = tmp_path / "best.pt"
    torch.save({**content, **CHECKPOINTS[case]}, path)

    with pytest.raises(CheckpointError, match=r"best\.pt: ") as caught:
        read_checkpoint(path)
    assert len(str(caught.value)) <= MESSAGE
    assert "\n" not in str(caught.value)


def with_another_list(raw: bytes) -> bytes:
    """Add a list of the entries of the archive *raw* for readers that take the one before its end.

    Others take the one to which the end points. In the new list, the tensor has no bytes.
    """
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        first = archive.start_dir
        names = archive.namelist()
    end = raw.rindex(b"PK\5\6")
    entries = bytearray(raw[first:end])
    position = 0

    for name in names:
        # Relative to what precedes the archive
        (begin,) = struct.unpack_from("<I", entries, position + 42)
        struct.pack_into("<I", entries, position + 42, max(0, begin - (end - first)))
        if name.endswith("data/0"):
            struct.pack_into("<I", entries, position + 24, 0)
        position += 46 + len(name)

    return raw[:end] + bytes(entries) + raw[end:]


def deflated() -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.zeros(1 << 20)}, file)
    with zipfile.ZipFile(file) as archive:
        contents = {
            name: archive.read(name) for name in sorted(archive.namelist(), reverse=True)
        }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return file.getvalue()


def test_what_only_the_reader_of_torch_finds_in_an_archive_is_counted(tmp_path: Path) -> None:
    file = io.BytesIO()
    torch.save({"a": Called(bytearray, 10)}, file)
    archives = [file.getvalue().replace(b"data.pkl", b"DATA.PKL")]
    if hasattr(torch._C.PyTorchFileReader, "get_record_size"):  # not in torch 2.11
        archives.append(with_another_list(deflated()))

    for raw in archives:
        assert torch.load(io.BytesIO(raw), weights_only=True)  # noqa: TID251
        with pytest.raises(CheckpointError, match="damaged"):
            load_plain(tmp_path / "best.pt", raw)


def test_a_list_that_is_named_twice_is_read(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "best.pt"
    twice = [1, 2]
    torch.save({**content, "training": {"a": twice, "b": twice, "c": ({"d": twice},)}}, path)

    assert read_checkpoint(path).training["c"] == ({"d": [1, 2]},)


def test_a_list_that_contains_itself_is_read_once() -> None:
    class CountedList(list[Any]):
        reads = 0

        def __iter__(self) -> Iterator[Any]:
            self.reads += 1
            return super().__iter__()

    own = CountedList([1, 2])
    own.append([own])
    with pytest.raises(ValueError, match="contains itself"):
        distinct_values(own)
    assert own.reads == 1


def read_bytes_calls(file: Path) -> list[str]:
    """List the calls in *file* that read a whole file without a limit."""
    calls = [
        node.func
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call)
    ]
    methods = [call.attr for call in calls if isinstance(call, ast.Attribute)]
    return [
        name
        for name in methods
        if name in {"read_bytes", "read_text", "loadtxt", "fromfile", "memmap"}
    ]


UNLIMITED = {
    # Files of a package.
    "html/report.py", "models/describe.py", "folders/evaluation_images.py",
    "reproduction/tables.py", "settings/recipe_files.py", "few_shot/cache.py",
    "api/web.py",
    # Files of the kernel.
    "base/environment.py", "decoding/child.py", "runtime/device_memory.py", "observability/busy.py",
}  # fmt: skip


def test_only_these_modules_read_files_without_a_limit() -> None:
    files = [file for package in PACKAGES.values() for file in package.rglob("*.py")]
    assert {"/".join(file.parts[-2:]) for file in files if read_bytes_calls(file)} == UNLIMITED
