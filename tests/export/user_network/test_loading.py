"""Weight files and builders of users: what is read, what is removed from names, and each error."""

import argparse
import json
import shlex
import tarfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from typer.testing import CliRunner

from sopdeploy.errors import CertificateError, ConfigError, WeightsError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.weights.class_names import check_order, read_class_names
from sopdeploy_commands.app import app
from sopdeploy_commands.rules import read_preprocess
from sopdeploy_export.capture.deployed import EXPORT_LOGITS, choose_output
from sopdeploy_export.prove.removed import find_shared_rests
from sopdeploy_export.user_network.builder import network_builder
from sopdeploy_export.user_network.loading import load_weights
from tests.export.user_network import networks as n
from tests.export.user_network.networks import (
    Exits,
    SharesClassifier,
    Sketch,
    Small,
    export_small,
    trained,
)
from tests.support.slow import mostly_slow

MODULE = "tests.export.user_network.networks"
STATE = trained(Small()).state_dict()


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in STATE.items()}


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in STATE.items() if key != name}


READ: dict[str, tuple[Any, str | None, str]] = {
    "a state dict": (STATE, None, ""),
    "a training checkpoint of timm": (
        {"epoch": 3, "args": argparse.Namespace(lr=0.1), "state_dict": STATE},
        None,
        "state_dict",
    ),
    "an average beside the weights": (
        {"model": prefixed("x."), "model_ema": STATE},
        "model_ema",
        "model_ema",
    ),
    "data parallel and compiled": (prefixed("_orig_mod.module."), None, ""),
    "averaged": (prefixed("module.") | {"n_averaged": torch.tensor(3)}, None, ""),
    "numbers of numpy, paths and a dict with defaults": (
        {
            "best": np.float64(0.5),
            "seen": np.arange(3),
            "names": np.array(["a"]),
            "out": Path("runs"),
            "data": PureWindowsPath("D:/x"),
            "log": defaultdict(list, {"loss": [np.float32(1)]}),
            "net": STATE,
        },
        None,
        "net",
    ),
    "arrays of numpy in place of tensors": ({k: v.numpy() for k, v in STATE.items()}, None, ""),
    "big-endian arrays": (
        {k: v.numpy().astype(v.numpy().dtype.newbyteorder(">")) for k, v in STATE.items()},
        None,
        "",
    ),
    "dicts in dicts": ({"checkpoint": {"model": STATE}, "epoch": 3}, None, "checkpoint.model"),
    "without counters": ({k: v for k, v in STATE.items() if "num_batches" not in k}, None, ""),
    "counts of operations": (
        STATE | {"total_ops": torch.zeros(1), "stem.0.total_params": torch.zeros(1)},
        None,
        "",
    ),
    "another attribute": (prefixed("net."), None, ""),
    "a wrapper inside": (
        {k.replace("stem.", "stem.module."): v for k, v in STATE.items()},
        None,
        "",
    ),
    "a loss and a metric beside it": (
        {
            "state_dict": prefixed("model.")
            | {"criterion.weight": torch.ones(2), "acc.tp": torch.ones(4)}
        },
        None,
        "state_dict",
    ),
    "one of two encoders": (prefixed("encoder_q.") | prefixed("encoder_k."), "encoder_q", ""),
    "FSDP around all, and checkpoints of activations inside": (
        {
            f"_fsdp_wrapped_module.{k}".replace("stem.", "stem._checkpoint_wrapped_module."): v
            for k, v in STATE.items()
        },
        None,
        "",
    ),
    "values that are not tensors": (STATE | {"epoch": 3, "_extra_state": None}, None, ""),
    "a network of other sizes beside it": (
        {
            "large": {key: torch.zeros(2, *value.shape) for key, value in STATE.items()},
            "net": STATE,
        },
        None,
        "net",
    ),
    "a tensor beside the table": ({"lr": torch.tensor(0.1), "net": STATE}, None, "net"),
}


IGNORED = {
    "averaged": ("n_averaged",),
    "counts of operations": ("total_ops", "stem.0.total_params"),
    "a loss and a metric beside it": ("criterion.weight", "acc.tp"),
    "one of two encoders": tuple(prefixed("encoder_k.")),
    "values that are not tensors": ("epoch", "_extra_state"),
    "values that are not tensors, behind a prefix": ("lr", "optimizer"),
}


@pytest.mark.parametrize("case", READ)
def test_a_table_is_found_and_prefixes_are_removed(case: str, tmp_path: Path) -> None:
    content, table, name = READ[case]
    torch.save(content, tmp_path / "w.pth")
    network = Small()
    loaded = load_weights(network, tmp_path / "w.pth", table)

    assert (loaded.table, loaded.ignored) == (name, IGNORED.get(case, ()))

    counted = (
        {key for key in STATE if "num_batches" in key} if case == "without counters" else set()
    )
    assert all(
        torch.equal(value, STATE[key])
        for key, value in network.state_dict().items()
        if key not in counted
    )


def wrapped(*names: str) -> nn.Module:
    network: nn.Module = Small()
    for name in reversed(names):
        network = nn.ModuleDict({name: network})
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "no wrapper": Small,
    "one child": lambda: wrapped("backbone"),
    "a child that has the name of a wrapper": lambda: wrapped("module"),
    "two deep": lambda: wrapped("model", "backbone"),
    "data parallel": lambda: nn.DataParallel(Small()),
    "data parallel inside": lambda: nn.ModuleDict({"backbone": nn.DataParallel(Small())}),
    "compiled": lambda: wrapped("_orig_mod"),  # as torch.compile names it
    "averaged": lambda: AveragedModel(Small()),
}
LAYOUTS: dict[
    str, Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], dict[str, Any]]
] = {
    "the state dict of the network": lambda own, _: own,
    "of the network that it wraps": lambda _, inner: inner,
    "data parallel": lambda own, _: {f"module.{name}": x for name, x in own.items()},
    "compiled": lambda own, _: {f"_orig_mod.{name}": x for name, x in own.items()},
    "Lightning": lambda own, _: {
        "state_dict": {f"model.{name}": x for name, x in own.items()}
        | {"criterion.weight": torch.ones(2)},
        "pytorch-lightning_version": "2.5.0",
        "hyper_parameters": {"lr": 0.1},
    },
    "Lightning of what it wraps": lambda _, inner: {
        "state_dict": {f"network.{name}": x for name, x in inner.items()}
    },
    "beside another network": lambda own, _: {
        "classifier": own,
        "critic": {"weight": torch.ones(2)},
    },
    "a dictionary of its parts": lambda _, inner: {
        part: {
            name.removeprefix(f"{part}."): x
            for name, x in inner.items()
            if name.startswith(f"{part}.")
        }
        for part in {name.partition(".")[0]: None for name in inner}
    },
    "a head that was added": lambda own, _: {**own, "rotation.weight": torch.ones(4, 8)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrapper", NETWORKS)
def test_each_layout_of_a_file_fits_each_wrapper_of_a_network(
    wrapper: str, layout: str, tmp_path: Path
) -> None:
    network = NETWORKS[wrapper]()
    first = next(iter(STATE))
    prefix = next(name for name in network.state_dict() if name.endswith(first)).removesuffix(
        first
    )
    own = {f"{prefix}{name}": tensor for name, tensor in STATE.items()}
    torch.save(LAYOUTS[layout](own, STATE), tmp_path / "w.pth")
    ignore = ["*rotation"] if "added" in layout else []
    loaded = load_weights(network, tmp_path / "w.pth", ignore=ignore)
    state = network.state_dict()

    assert all(torch.equal(state[name], tensor) for name, tensor in own.items())

    added = [name for name in loaded.ignored if "rotation" in name or name.startswith("crit")]
    assert (
        len(added)
        == len(loaded.ignored)
        == (1 if "added" in layout or layout == "Lightning" else 0)
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [(None, None), (".", 0.0), ("ema", 1.0), ("state.ema", 1.0), ("state", 0.0)],
)
def test_each_name_that_a_refusal_lists_chooses_the_tensors(
    key: str | None, value: float | None, tmp_path: Path
) -> None:
    table = {name: torch.full(x.shape, 0.0).to(x.dtype) for name, x in STATE.items()}
    table |= {f"ema.{name}": torch.full(x.shape, 1.0).to(x.dtype) for name, x in STATE.items()}
    torch.save({"state": table} if key in ("state.ema", "state") else table, tmp_path / "w.pth")
    network = Small()
    if key is None:
        with pytest.raises(WeightsError, match=r"\(\., ema\); .*weights_key"):
            load_weights(network, tmp_path / "w.pth")
        return
    load_weights(network, tmp_path / "w.pth", key)

    assert bool((network.fc.bias == value).all())


class Blocks(nn.Module):
    def __init__(
        self, depth: int = 2, heads: int = 2, bias: bool = False, size: int = 3
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=bias)
        self.blocks = nn.Sequential(*(nn.Conv2d(8, 8, 1) for _ in range(depth)))
        self.heads = nn.ModuleList(nn.Linear(8, 2) for _ in range(heads))
        self.prompts = nn.ParameterList([nn.Parameter(torch.ones(1))] * heads)
        self.register_buffer("mask", torch.ones(size), persistent=False)


OTHER_OPTIONS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "one more block": (
        Blocks(depth=3).state_dict(),
        r"\S*blocks\.2\.weight.* one\.blocks\.2;",
    ),
    "one more head of a list": (
        Blocks(heads=3).state_dict(),
        r"\S*heads\.2\.weight.* one\.heads\.2, one\.prompts",
    ),
    "a bias": (
        Blocks(bias=True).state_dict(),
        r"conv\.bias.* one\.conv\.bias",
    ),
    "another mask": (
        Blocks().state_dict() | {"mask": torch.zeros(3)},
        r"one\.mask other values",
    ),
    "a mask of another size": (
        Blocks().state_dict() | {"mask": torch.ones(4)},
        r"one\.mask other values",
    ),
}


@pytest.mark.parametrize("prefix", ["", "net.", "module."])
@pytest.mark.parametrize("case", OTHER_OPTIONS)
def test_a_file_of_a_network_with_other_options_is_refused(
    case: str, prefix: str, tmp_path: Path
) -> None:
    state, message = OTHER_OPTIONS[case]
    torch.save(
        {f"{prefix}{name}": tensor for name, tensor in state.items()}, tmp_path / "w.pth"
    )

    with pytest.raises(WeightsError, match=message):
        load_weights(nn.ModuleDict({"one": Blocks()}), tmp_path / "w.pth")


def test_an_unstored_buffer_that_the_file_has_too_is_ignored(tmp_path: Path) -> None:
    torch.save(Blocks().state_dict() | {"mask": torch.ones(3)}, tmp_path / "w.pth")
    assert load_weights(Blocks(), tmp_path / "w.pth").ignored == ("mask",)


class Richer(nn.Module):
    """A network whose options add a layer, a gate, a second recurrent layer or an adapter."""

    def __init__(self, *, attends: bool = False, gate: float = 0.0, layers: int = 1) -> None:
        super().__init__()
        self.block_1 = nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(8) if attends else nn.ReLU())
        self.se = nn.Linear(8, 8) if attends else None
        self.gamma = nn.Parameter(gate * torch.ones(8)) if gate else None
        self.gru = nn.GRU(8, 8, num_layers=layers)
        self.fc = nn.Linear(8, 2)


def plus(network: nn.Module, *names: str) -> dict[str, torch.Tensor]:
    return {**network.state_dict(), **{name: torch.ones(2, 8) for name in names}}


RICHER: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "attention to channels": (
        Richer(attends=True).state_dict(),
        r"block_1\.1\.weight, se;",
    ),
    "a scale": (Richer(gate=0.1).state_dict(), r"gamma.* try ignore='gamma'"),
    "a second recurrent layer": (
        Richer(layers=2).state_dict(),
        r"gru\.weight_ih_l1, gru\.weight_hh_l1",
    ),
    "an adapter": (
        plus(Richer(), "fc.lora_A", "fc.lora_B"),
        r"fc\.lora_A, fc\.lora_B",
    ),
    "a block by its number": (plus(Richer(), "block_2.0.weight"), r"try ignore='block_2'"),
    "a layer of a block": (plus(Richer(), "block_1.2.weight"), r"try ignore='block_1.2'"),
    "weights of another norm": (
        plus(Richer(), "fc.parametrizations.weight.0._u"),
        r"fc\.param",
    ),
}


@pytest.mark.parametrize("prefix", ["", "net.", "module."])
@pytest.mark.parametrize("case", RICHER)
def test_a_file_of_a_richer_network_is_refused_unless_entries_are_named(
    case: str, prefix: str, tmp_path: Path
) -> None:
    state, message = RICHER[case]
    path = tmp_path / "w.pth"
    torch.save({f"{prefix}{name}": tensor for name, tensor in state.items()}, path)
    with pytest.raises(WeightsError, match=message.replace("ignore='", "ignore='.*")):
        load_weights(Richer(), path)

    # Named, they are ignored, and the others are there.
    added = [name for name in state if name not in Richer().state_dict()]
    loaded = load_weights(Richer(), path, ignore=added)
    assert loaded.ignored == tuple(f"{prefix}{name}" for name in added)


def test_what_a_refusal_of_a_richer_file_proposes_is_accepted(tmp_path: Path) -> None:
    torch.save(plus(Richer(), "net.aux.0.weight", "net.aux.0.bias"), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="net") as refused:
        load_weights(Richer(), tmp_path / "w.pth")

    pattern = str(refused.value.remedies["ignore"])
    assert len(load_weights(Richer(), tmp_path / "w.pth", ignore=[pattern]).ignored) == 2


BESIDE: dict[str, dict[str, Any]] = {
    "a loss beside a prefix": {
        **{f"net.{name}": tensor for name, tensor in Richer().state_dict().items()},
        "loss.weight": torch.ones(2),
    },
    "the other of two networks": {
        **{f"student.{name}": tensor for name, tensor in Richer().state_dict().items()},
        **{f"teacher.{name}": tensor for name, tensor in plus(Richer(), "se.weight").items()},
    },
    "a table of its own": {
        "block_1": Richer().block_1.state_dict(),
        "gru": Richer().gru.state_dict(),
        "fc": Richer().fc.state_dict(),
        "center_loss": {"centers": torch.ones(2, 8)},
    },
}


@pytest.mark.parametrize("case", BESIDE)
def test_entries_beside_the_network_are_ignored_with_a_warning(
    case: str, tmp_path: Path
) -> None:
    torch.save(BESIDE[case], tmp_path / "w.pth")
    key = "student" if case == "the other of two networks" else None
    loaded = load_weights(Richer(), tmp_path / "w.pth", key)

    assert loaded.ignored
    assert loaded.warnings[0].startswith("ignored")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, ()),
        (torch.float16, ("float16",)),
        (torch.float64, ("float64",)),
    ],
)
def test_another_type_of_the_weights_of_a_file_is_told(
    dtype: torch.dtype, expected: tuple[str, ...], tmp_path: Path
) -> None:
    torch.save(Small().to(dtype).state_dict(), tmp_path / "w.pth")

    warnings = load_weights(Small(), tmp_path / "w.pth").warnings
    assert len(warnings) == len(expected)
    assert all(name in warning for name, warning in zip(expected, warnings, strict=True))


class HasExtraState(Small):
    temperature = 1.0

    def get_extra_state(self) -> dict[str, float]:
        return {"temperature": self.temperature}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.temperature = state["temperature"]


@pytest.mark.parametrize("prefix", ["", "module.", "net."])
def test_a_network_gets_the_extra_state_in_the_file(prefix: str, tmp_path: Path) -> None:
    saved = prefixed(prefix) | {f"{prefix}_extra_state": {"temperature": 0.5}}
    torch.save(saved, tmp_path / "w.pth")
    network = HasExtraState()

    assert load_weights(network, tmp_path / "w.pth").ignored == ()
    assert network.temperature == 0.5


def test_a_network_keeps_its_extra_state_if_the_file_has_none(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "w.pth")
    network = HasExtraState()
    load_weights(network, tmp_path / "w.pth")
    assert network.temperature == 1


class Skips(Small):
    def load_state_dict(self, state_dict: Any, *args: Any, **options: Any) -> Any:
        return super().load_state_dict({}, strict=False)


class Halves(Small):
    def load_state_dict(self, state_dict: Any, *args: Any, **options: Any) -> Any:
        return super().load_state_dict(
            {name: tensor / 2 for name, tensor in state_dict.items()}
        )


class Deletes(Small):
    def load_state_dict(self, state_dict: Any, *args: Any, **options: Any) -> Any:
        loaded = super().load_state_dict(state_dict)
        self.fc.bias = None
        return loaded


class Adds(Small):
    def load_state_dict(self, state_dict: Any, *args: Any, **options: Any) -> Any:
        loaded = super().load_state_dict(state_dict)
        self.register_buffer("scale", torch.ones(1))
        return loaded


class Reshapes(Small):
    def load_state_dict(self, state_dict: Any, *args: Any, **options: Any) -> Any:
        loaded = super().load_state_dict(state_dict)
        self.fc.bias.data = self.fc.bias[None]
        return loaded


class Raises(Small):
    def load_state_dict(self, state_dict: Any, *args: Any, **options: Any) -> Any:
        raise KeyError("head")


class SkipsInside(Small):
    def __init__(self) -> None:
        super().__init__()
        self.fc.register_load_state_dict_pre_hook(
            lambda _, state, prefix, *__: state[f"{prefix}bias"].zero_()
        )


class Hides(Small):
    def state_dict(self, *args: Any, **options: Any) -> Any:
        return {"fc.bias": super().state_dict()["fc.bias"]}

    def load_state_dict(self, state_dict: Any, *args: Any, **options: Any) -> Any:
        return super().load_state_dict({"fc.bias": state_dict["fc.bias"]}, strict=False)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Skips, "other values"),
        (Halves, "other values"),
        (SkipsInside, r"other values"),
        (Hides, "other values"),
        (Deletes, r"fc\.bias is missing"),
        (Adds, "scale is new"),
        (Reshapes, r"fc\.bias .*shape"),
        (Raises, "KeyError: 'head'"),
    ],
)
def test_a_network_that_does_not_load_the_file_is_refused(
    kind: type[Small], message: str, tmp_path: Path
) -> None:
    torch.save(STATE, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=message):
        load_weights(kind(), tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("content", "labels"),
    [
        ({"class_names": ["b", "a"]}, ("b", "a")),
        ({"classes": ("b", "a")}, ("b", "a")),
        ({"id2label": {0: "b", 1: "a"}}, ("b", "a")),
        ({"metadata": {"class_names": ["b", "a"], "epoch": 3}}, ("b", "a")),
        ({"hyper_parameters": {"classes": 2}}, None),
        ({"classes": ["b", "a"], "class_to_idx": {"b": 0, "a": 1}}, ("b", "a")),
        ({"classes": ["a", "b"], "class_to_idx": {"b": 0, "a": 1}}, None),  # which order?
    ],
)
def test_class_names_are_found_under_the_keys_that_people_use(
    content: dict[str, Any], labels: Any, tmp_path: Path
) -> None:
    torch.save({"model": STATE, **content}, tmp_path / "w.pth")
    assert load_weights(Small(), tmp_path / "w.pth").labels == labels


@pytest.mark.parametrize(
    ("given", "in_file", "num_warnings"),
    [
        ("ab", "ab", 0),
        ("ab", None, 0),
        ("xy", "ab", 1),
        ("abc", "ab", 1),
        ("ba", "ab", None),  # refused
        ("bca", "abc", None),
    ],
)
def test_the_order_of_the_names_is_compared_with_the_file(
    given: str, in_file: str | None, num_warnings: int | None
) -> None:
    known = None if in_file is None else tuple(in_file)
    if num_warnings is None:
        with pytest.raises(ConfigError) as refused:
            check_order(given, known, Path("w.pth"))
        assert refused.value.setting == "labels"
        return
    assert len(check_order(given, known, Path("w.pth"))) == num_warnings


@pytest.mark.parametrize(
    ("numbers", "labels"),
    [
        ({"a": 1, "b": 0}, ("b", "a")),
        ({"a": np.int64(0), "b": np.int64(1)}, ("a", "b")),
        ({"a": 1, "b": 2}, None),
        ({"a": 0, "b": 0}, None),
        ({1: 0}, None),
        ("a", None),
    ],
)
def test_class_to_idx_of_a_file_gives_the_labels(
    numbers: Any, labels: Any, tmp_path: Path
) -> None:
    torch.save({"model": STATE, "class_to_idx": numbers}, tmp_path / "w.pth")
    assert load_weights(Small(), tmp_path / "w.pth").labels == labels


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_called_by_its_name(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"TorchScript"):
        load_weights(Small(), tmp_path / "w.pt")


WRONG: dict[str, tuple[Any, str | None, str]] = {
    "a pickled module": (
        Small(),
        None,
        r"could run code",
    ),
    "two tables": (
        {"model": STATE, "model_ema": STATE},
        None,
        r"\(model, model_ema\)",
    ),
    "another table": ({"model": STATE}, "ema", r"weights_key='ema': .* model"),
    "a table of a single one": (STATE, "model", r"single table"),
    "two encoders": (
        prefixed("encoder_q.") | prefixed("encoder_k."),
        None,
        r"\(encoder_q, encoder_k\)",
    ),
    "another of two encoders": (
        prefixed("encoder_q.") | prefixed("encoder_k."),
        "encoder_x",
        "encoder_q, encoder_k",
    ),
    "an array of a type that torch lacks": (
        {"x": np.zeros(3, "longdouble")},
        None,
        r"no table",
    ),
    "an array of another size": (
        {"x": np.zeros(3), "net": without("fc.bias")},
        None,
        r"fc\.bias is missing",
    ),
    "no table": ({"epoch": 3}, None, r"no table"),
    "a missing tensor behind a prefix": (
        prefixed("a.") | {"b": STATE["fc.bias"]},
        "c",
        r"weights_key='c'",
    ),
    "a missing tensor": (
        without("fc.bias"),
        None,
        r"fc\.bias is missing; \d+",
    ),
    "a pruned weight": (
        without("fc.weight")
        | {"model.fc.weight_orig": STATE["fc.weight"], "model.fc.weight_mask": torch.ones(4)},
        None,
        r"fc\.weight is missing; \d+",
    ),
    "a pruned weight behind a prefix": (
        {f"model.{name}": tensor for name, tensor in without("fc.weight").items()}
        | {"model.fc.weight_orig": STATE["fc.weight"], "model.fc.weight_mask": torch.ones(4)},
        None,
        r"fc\.weight .*model\.fc\.weight_orig, model\.fc\.weight_mask: ",
    ),
    "an adapter around a layer": (
        without("fc.weight")
        | {"fc.base_layer.weight": STATE["fc.weight"], "fc.lora_A.weight": torch.ones(2, 8)},
        None,
        r"fc\.base_layer\.weight, fc\.lora_A\.weight: ",
    ),
    "another shape": (
        STATE | {"fc.bias": torch.ones(7)},
        None,
        r"fc\.bias is \(7,\)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_does_not_fit_is_rejected(case: str, tmp_path: Path) -> None:
    content, table, message = WRONG[case]
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=message):
        load_weights(Small(), tmp_path / "w.pth", table)


@pytest.mark.parametrize(
    ("import_path", "settings"),
    [
        *[
            (f"{name}:Small", ())
            for name in ("../a/net", "my-net.py", "..", ".", "../", "./..", "a..b", ".py")
        ],
        ("torch.nn", ()),
        ("no_such_module:build", ()),
        ("no_such.models:build", ()),
        ("torch.nnn:Linear", ()),
        ("torch.nn:NoSuch", ()),
        (f"{MODULE}.py:Small", ()),
        (f"{MODULE}:Small", ("auxx=true",)),
        ("torch.nn.functional:__name__", ()),
        ("builtins:dict", ()),
        ("torch.nn:LazyLinear", ("out_features=3",)),
    ],
)
def test_a_builder_that_cannot_be_used_is_one_line_with_its_name(
    import_path: str, settings: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        network_builder("network", import_path, settings)()
    assert import_path in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["aux", "aux=off", "x=null"])
def test_an_option_that_is_neither_a_literal_nor_a_text_is_named(option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        network_builder("network", f"{MODULE}:Keeps", (option,))


def test_options_of_a_builder_are_python_literals_or_text() -> None:
    settings = (
        "aux=false",
        "sharpen=False",
        "depth=18",
        "widths=(8, 16)",
        "act=relu",
        "norm='none'",
        "k=None",
    )
    built = network_builder("network", f"{MODULE}:Keeps", settings)()
    expected = {
        "aux": False,
        "sharpen": False,
        "depth": 18,
        "widths": (8, 16),
        "act": "relu",
        "norm": "none",
    }

    assert vars(built)["options"] == {**expected, "k": None}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("imagenet", Preprocess()),
        ("imagenet:32", Preprocess(resize=36, crop=32)),
        ("timm", Preprocess(interpolation="bicubic")),
        ("timm:384", Preprocess(resize=438, crop=384, interpolation="bicubic")),
        ("none:8", Preprocess(resize=9, crop=8, mean=(0, 0, 0), std=(1, 1, 1))),
    ],
)
def test_a_convention_of_preprocessing_has_a_name(text: str, expected: Preprocess) -> None:
    assert read_preprocess(text) == expected


@pytest.mark.parametrize(
    "text", ["imagenet:", "imagenet:big", "imagenet:0", "imagenet:99999", "imagenett"]
)
def test_a_convention_that_does_not_exist_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError):
        read_preprocess(text)


def test_json_is_json_whatever_the_code_of_a_network_prints(tmp_path: Path, capfd: Any) -> None:
    torch.save(STATE, tmp_path / "w.pth")
    arguments = ["--network", f"{MODULE}:talking", "--preprocess", "imagenet:12", "--json"]

    with pytest.raises(SystemExit) as ended:
        app(["inspect", str(tmp_path / "w.pth"), *arguments])

    printed = capfd.readouterr()
    assert not ended.value.code
    assert json.loads(printed.out)["unused"] == ["aux"]
    assert {"from Python", "from a program"} <= {*printed.err.splitlines()}


@pytest.mark.parametrize("text", ["[" * 100_000, '{"resize": 0}', "x"])
def test_a_file_that_holds_no_preprocessing_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "rules.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^preprocess='.*rules\.json': .*\("):
        read_preprocess(str(tmp_path / "rules.json"))


def test_the_command_exports_a_weight_file_and_inspect_names_the_unused_part(
    tmp_path: Path,
) -> None:
    torch.save({"model": STATE}, tmp_path / "w.pth")
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n", encoding="utf-8")
    (tmp_path / "rules.json").write_text('{"resize": 12, "crop": 12}', encoding="utf-8")
    weights, rules = str(tmp_path / "w.pth"), ("--preprocess", str(tmp_path / "rules.json"))
    network = ("--network", f"{MODULE}:Small")
    inspected = CliRunner().invoke(app, ["inspect", weights, *network, *rules])

    assert inspected.exit_code == 0
    assert "unused   aux" in inspected.stdout

    out, labels = ("--out", str(tmp_path / "out")), ("--labels", str(tmp_path / "names.txt"))
    parts = (
        "--plain",
        f"{MODULE}:Small",
        "--plain-option",
        "aux=false",
        "--training-only",
        "aux*",
    )
    exported = CliRunner().invoke(
        app, ["export", weights, *network, *parts, *labels, *rules, *out]
    )

    assert exported.exit_code == 0, exported.output
    certificate = json.loads((tmp_path / "out/latest/certificate.json").read_bytes())
    assert certificate["proof"] == "three-way"
    assert (tmp_path / "out" / "latest").readlink().name.startswith("w-")


def test_the_key_of_the_logits_stays_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(STATE, tmp_path / "w.pth")
    outputs, chosen = {"0": torch.zeros(1), "1": torch.ones(1)}, []

    def choose(network: nn.Module, _preprocess: object, **_options: object) -> Any:
        chosen.append(choose_output(outputs, vars(network)[EXPORT_LOGITS]))
        return SimpleNamespace(
            removable=(), shared_rests={}, num_classes=4, num_bytes=48, warnings=()
        )

    monkeypatch.setattr("sopdeploy_export.user_network.admission.admit", choose)
    given = (
        str(tmp_path / "w.pth"),
        "--network",
        f"{MODULE}:Small",
        "--preprocess",
        "imagenet",
    )
    allowed = (
        "--set",
        "allow_constants=true",
    )
    assert run("inspect", *given, "--set", "logits_key=1", *allowed).startswith("0 ")
    assert chosen == [outputs["1"]]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    return f"{result.exit_code} {result.output}"


@pytest.mark.slow
def test_the_command_that_inspect_prints_exports_without_unneeded_exits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(trained(Exits()).state_dict(), "w.pth")
    Path("labels.txt").write_text("a\nb\nc\nd\n", encoding="utf-8")
    Path("rules.json").write_text('{"resize": 12, "crop": 12}', encoding="utf-8")
    given = ("w.pth", "--network", f"{MODULE}:Exits", "--preprocess", "rules.json")

    assert "0 (2, 4), 1.0 (2, 4), 1.1 (2, 4)" in run("inspect", *given)

    inspected = json.loads(
        CliRunner().invoke(app, ["inspect", *given, "--set", "logits_key=0", "--json"]).stdout
    )
    assert inspected["unused"] == ["heads"]

    proposed = run(
        "export", *given, "--set", "logits_key=0", "--detach", "--labels", "labels.txt"
    )
    assert "add --training-only heads" in proposed

    exported = run(*shlex.split(inspected["command"])[1:])
    assert exported.startswith("0 ")
    assert "heads (4 tensors" in exported
    assert "no plain network was given" in exported


def test_inspect_says_what_a_branch_shares_with_the_rest(tmp_path: Path) -> None:
    torch.save(trained(SharesClassifier()).state_dict(), tmp_path / "w.pth")
    (tmp_path / "rules.json").write_text('{"resize": 12, "crop": 12}', encoding="utf-8")
    given = (str(tmp_path / "w.pth"), "--network", f"{MODULE}:SharesClassifier")
    inspected = run("inspect", *given, "--preprocess", str(tmp_path / "rules.json"))

    assert "unused   branch.0\n" in inspected
    assert "branch.1.bias is fc.bias\n" in inspected
    assert "--training-only branch.0 " in inspected


def test_a_branch_that_owns_a_needed_tensor_stays() -> None:
    bias = torch.zeros(1)
    tensors = {
        "branch.0.weight": torch.zeros(1),
        "branch.1.weight": torch.zeros(1),
        "branch.1.bias": bias,
        "fc.bias": bias,
    }
    needed_by_both = {"branch.1.bias", "fc.bias"}

    for needed, shared in (
        (needed_by_both, {"branch": "branch.1.bias is fc.bias"}),
        (needed_by_both | {"branch.1.weight"}, {}),
    ):
        trained: Any = SimpleNamespace(tensors=tensors, used=needed)
        assert find_shared_rests(trained, ("branch.0",)) == shared


def test_a_builder_that_draws_what_the_file_lacks_is_refused(
    tmp_path: Path,
) -> None:
    network = trained(Sketch())
    torch.save(network.state_dict(), tmp_path / "w.pth")
    with pytest.raises(CertificateError, match=r"signs differs"):
        export_small(network, tmp_path / "out", rebuild=Sketch)


UNBUILDABLE = ("--network", f"{MODULE}:unbuildable")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--labels", "names.txt"), "--labels: "),
        (("--network", f"{MODULE}:Small"), "--labels: "),
        (("--network", f"{MODULE}:Small", "--labels", "classes.txt"), "--preprocess: "),
        (
            (
                "--network",
                f"{MODULE}:Small",
                "--labels",
                "classes.txt",
                "--transform",
                "nowhere",
            ),
            "--transform",
        ),
        ((*UNBUILDABLE, "--preprocess", "imagenet"), "--labels: "),
        (
            (*UNBUILDABLE, "--preprocess", "imagenet", "--labels", "no.txt"),
            "no.txt",
        ),
        ((*UNBUILDABLE, "--labels", "w.pth"), "UTF-8"),
        (
            (
                *(*UNBUILDABLE, "--preprocess", "imagenet", "--labels", "classes.txt"),
                *("--plain", f"{MODULE}:Smal"),
            ),
            "Smal",
        ),
        (("--network", f"{MODULE}:unbuildable", "--option", "x=1"), "--labels: "),
    ],
)
def test_options_that_do_not_fit_together_are_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    torch.save(STATE, tmp_path / "w.pth")
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n", encoding="utf-8")
    given = [
        str(tmp_path / word) if (tmp_path / word).is_file() else word
        for word in ("w.pth", *arguments)
    ]
    result = CliRunner().invoke(app, ["export", *given])

    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize("command", ["export", "inspect"])
def test_a_missing_file_is_found_before_the_network_is_built(
    command: str, tmp_path: Path
) -> None:
    given = (command, str(tmp_path / "no.pth"), *UNBUILDABLE, "--preprocess", "imagenet")
    printed = run(*given)
    assert printed.startswith("2 ")
    assert "no.pth" in printed


SAVED: dict[str, tuple[Callable[[Path], object], str]] = {
    "of torch": (
        lambda path: torch.save({"state_dict": STATE}, path),
        "weights, not a bundle",
    ),
    "of torch 1.5": (
        lambda path: torch.save({"model": STATE}, path, _use_new_zipfile_serialization=False),
        "weights, not a bundle",
    ),
    "empty": (
        lambda path: tarfile.open(path, "w").close(),
        "an archive",
    ),
    "with a file": (
        lambda path: archive(path),
        "an archive",
    ),
}


def archive(path: Path) -> None:
    with tarfile.open(path, "w") as file:
        file.add(__file__, "manifest.json")


@pytest.mark.parametrize("command", ["verify", "serve"])
@pytest.mark.parametrize("case", SAVED)
def test_a_file_that_ends_in_tar_is_known_by_its_content(
    case: str, command: str, tmp_path: Path
) -> None:
    write, message = SAVED[case]
    write(tmp_path / "best.pth.tar")
    printed = run(command, str(tmp_path / "best.pth.tar"))

    assert printed.startswith("2 ")
    assert message in printed


@pytest.mark.slow
def test_inspect_asks_for_class_names_only_if_the_file_has_none(tmp_path: Path) -> None:
    given = ("--network", f"{MODULE}:Small", "--preprocess", "imagenet:12")
    for names, asks in (("", True), ("abcd", False), ("abc", True)):
        content = {
            "model": STATE,
            "class_to_idx": {name: number for number, name in enumerate(names)},
        }
        torch.save(content if names else {"model": STATE}, tmp_path / "w.pth")
        printed = run("inspect", str(tmp_path / "w.pth"), *given)
        assert printed.startswith("0 ")
        assert ("labels.txt" in printed) is asks


def save_weights(folder: Path, builder: str) -> tuple[str, ...]:
    """Save the weights of a network, as its *builder* draws them; return the arguments of commands for it."""
    weights = folder / "w.pth"
    torch.save(getattr(n, builder)().state_dict(), weights)
    return str(weights), "--network", f"{MODULE}:{builder}", "--preprocess", "imagenet:12"


@pytest.mark.parametrize("builder", mostly_slow(["Sigmoid", "Shares"], "Sigmoid"))
def test_inspect_refuses_what_export_refuses_before_its_proof(
    builder: str, tmp_path: Path
) -> None:
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n", encoding="utf-8")
    given = save_weights(tmp_path, builder)
    refused = run("inspect", *given).removeprefix("2 ")

    assert refused.startswith("error: ")

    exported = run("export", *given, "--labels", str(tmp_path / "names.txt"))
    assert exported.splitlines()[-1] == refused.splitlines()[-1]


def test_inspect_allows_what_its_command_then_allows(tmp_path: Path) -> None:
    given = save_weights(tmp_path, "Hides")
    printed = run("inspect", *given, "--set", "allow_constants=true", "--several-classes")
    assert printed.startswith("0 ")
    assert (
        "--set allow_constants=true --several-classes --training-only aux --labels labels.txt"
        in printed
    )


def test_inspect_names_every_part_that_the_output_does_not_need(tmp_path: Path) -> None:
    given = save_weights(tmp_path, "Generates")
    assert "unused   aux, head\n" in run("inspect", *given)


def test_what_a_removed_part_has_more_in_the_file_is_ignored(tmp_path: Path) -> None:
    torch.save(plus(Small(), "aux.scale"), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"aux\.scale"):
        load_weights(Small(), tmp_path / "w.pth")

    loaded = load_weights(Small(), tmp_path / "w.pth", training_only=["aux*"])
    assert loaded.ignored == ("aux.scale",)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("head*", r"ignore='head\*'.*gamma"), ("gama", "mean gamma")],
)
def test_an_entry_to_ignore_that_the_file_lacks_is_one_line(
    pattern: str, message: str, tmp_path: Path
) -> None:
    torch.save(plus(Richer(), "gamma"), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=message):
        load_weights(Richer(), tmp_path / "w.pth", ignore=[pattern])


def test_the_convention_of_clip_is_that_of_its_first_release() -> None:
    rules = read_preprocess("clip")
    assert (rules.resize, rules.crop, rules.interpolation) == (224, 224, "bicubic")
    assert rules.mean == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)


@pytest.mark.parametrize("name", ["names.txt", "names.json"])
def test_a_byte_order_mark_is_not_part_of_a_class_name(tmp_path: Path, name: str) -> None:
    text = {"names.txt": "cat\r\ndog\r\n", "names.json": '["cat", "dog"]'}[name]
    (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    assert read_class_names(tmp_path / name) == ("cat", "dog")
