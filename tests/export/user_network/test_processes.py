"""Builders whose networks differ between calls, and code that runs when it is imported."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from sopdeploy.errors import LoweringError
from sopdeploy_commands.app import app
from sopdeploy_export.options import ExportOptions
from tests.export.user_network.networks import SIDE, Small, export_small, trained
from tests.support.slow import mostly_slow

QUICK = ExportOptions(max_batch=4)
HEAD = """
import argparse, functools, os, pathlib, sys
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, mix=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, 4)
        self.register_buffer("mix", torch.eye(8) if mix is None else mix, persistent=False)

    def forward(self, images):
        return self.fc(self.conv(images).relu().mean((2, 3)) @ self.mix)
"""


def weights() -> dict[str, torch.Tensor]:
    """Make the weights of `Net`, always the same ones."""
    torch.manual_seed(3)
    return nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3), "fc": nn.Linear(8, 4)}).state_dict()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with weights and class names, which is the current one; modules in it can be imported."""
    torch.save(weights(), tmp_path / "w.pth")
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("nets_of_test")]:
        del sys.modules[name]


def export_module(folder: Path, text: str) -> tuple[int, str]:
    """Export `build` of a module with *text*; return the exit code and what the command prints."""
    (folder / "nets_of_test.py").write_text(HEAD + text, encoding="utf-8")
    arguments = ["--network", "nets_of_test:build", "--labels", "names.txt"]
    rules = ["--preprocess", f"imagenet:{SIDE}", "--max-batch", "4", "--out", "out"]
    result = CliRunner().invoke(app, ["export", "w.pth", *arguments, *rules])
    return result.exit_code, " ".join(result.output.split())


EXPORTED = {
    "one after the other": "build = Net",
    "arguments of its own script": """
parser = argparse.ArgumentParser()
parser.add_argument("--depth", type=int, default=1)
args = parser.parse_args()
build = Net
""",
    "arguments that the builder reads": """
def build():
    return Net() if not sys.argv[1:] else None
""",
    "a generator of a fixed seed": """
def build():
    return Net(torch.randn(8, 8, generator=torch.Generator().manual_seed(4)))
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", EXPORTED)
def test_a_builder_that_can_be_called_again_is_exported(case: str, folder: Path) -> None:
    code, printed = export_module(folder, EXPORTED[case])
    assert code == 0, printed


REFUSED = {
    "a list that grows": (
        """
def build(widths=[]):
    widths.append(8)
    network = Net()
    network.more = nn.ModuleList(nn.Linear(1, 1) for _ in widths[1:])
    return network
""",
        "more.0.weight",
    ),
    "one network for all calls": (
        "NET = Net()\ndef build(): return NET",
        "in a variable",
    ),
    "a builder that keeps its result": (
        "build = functools.cache(lambda: Net())",
        "in a variable",
    ),
    "a script that needs arguments": (
        "parser = argparse.ArgumentParser(); parser.add_argument('data'); parser.parse_args()\nbuild = Net",
        "SystemExit: 2",
    ),
    "a script that asks for something": (
        "name = input('name of the run? ')\nbuild = Net",
        "EOFError",
    ),
    "a download without a network": (
        """
import urllib.request
def build():
    urllib.request.urlopen("http://weights.invalid/net.pth", timeout=5)
""",
        "URLError",
    ),
}


@pytest.mark.parametrize(
    "case",
    mostly_slow(
        REFUSED,
        "a script that needs arguments",
        "a script that asks for something",
        "a download without a network",
    ),
)
def test_a_builder_that_differs_is_refused_with_the_reason(case: str, folder: Path) -> None:
    text, message = REFUSED[case]
    code, printed = export_module(folder, text)
    assert code == 2
    assert message in printed
    assert not list(folder.glob("out/*/manifest.json"))


class Merging(nn.Linear):
    """Adds its adapter to the weight in eval mode, as loralib does."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.adapter = nn.Parameter(torch.ones(4, 8))
        self.is_merged = False

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if mode == self.is_merged:
            self.weight.data += self.adapter.data * (-1 if mode else 1)
            self.is_merged = not mode
        return self


class Rescaling(Merging):
    """Replaces its weight in eval mode by a new tensor."""

    def eval(self) -> "Rescaling":
        self.weight.data = self.weight.data * 2
        return super().eval()


class Fusing(Merging):
    """Removes its adapter in eval mode, as networks do that fuse branches."""

    def train(self, mode: bool = True) -> "Fusing":
        super().train(mode)
        if not mode:
            self._parameters.pop("adapter", None)
        return self


@pytest.mark.parametrize("kind", [Merging, Rescaling, Fusing])
def test_a_network_whose_eval_rewrites_weights_is_as_before(
    kind: type[Merging], tmp_path: Path
) -> None:
    network = trained(Small(aux=False))
    network.fc = kind()
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    export_small(network, tmp_path, options=QUICK)
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert network.training


class Scales(Small):
    """Multiplies its features by parameters that no module registers."""

    def __init__(self) -> None:
        super().__init__(aux=False)
        self.scales = {"list": [nn.Parameter(torch.ones(1))]}

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return super().features(images) * self.scales["list"][0]


GATE = nn.Parameter(torch.ones(8))


class Gates(Small):
    """Multiplies its features by a global parameter."""

    def __init__(self) -> None:
        super().__init__(aux=False)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return super().features(images) * GATE


class Closes(Small):
    """Multiplies its features by a parameter of a closure."""

    def __init__(self) -> None:
        super().__init__(aux=False)
        gate = nn.Parameter(torch.ones(8))
        self.gated = lambda features: torch.mul(gate, features)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.gated(super().features(images))
        return features


@pytest.mark.parametrize(
    "kind", [Scales, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (Gates, Closes))]
)
def test_a_parameter_that_no_module_registers_is_refused_whatever_its_size(
    kind: type[Small], tmp_path: Path
) -> None:
    network = trained(kind())
    with pytest.raises(LoweringError, match=r"\([18],\).*allow_const"):
        export_small(network, tmp_path, options=QUICK, rebuild=kind)
    export_small(network, tmp_path, options=QUICK, rebuild=kind, allow_constants=True)


def test_two_layers_that_only_the_builder_ties_are_named(folder: Path) -> None:
    text = """
def build():
    network = Net()
    network.other = nn.Linear(8, 4)
    if os.path.exists("names.txt"):
        network.other.weight = network.fc.weight
    return network
"""
    torch.save(
        {**weights(), "other.weight": torch.ones(4, 8), "other.bias": torch.ones(4)}, "w.pth"
    )
    code, printed = export_module(folder, text)

    assert code == 2
    assert "fc.weight and other.weight" in printed


class Tied(Small):
    """Has an auxiliary branch whose first weight is also the weight of a layer that stays."""

    def __init__(self, *, branch: bool = True) -> None:
        super().__init__(aux=False)
        self.middle = nn.Linear(8, 8)
        if branch:
            self.exit = nn.ModuleDict({"middle": nn.Linear(8, 8), "out": nn.Linear(8, 4)})
            self.exit["middle"].weight = self.middle.weight

    def features(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.middle(super().features(images))
        return features


@pytest.mark.slow
def test_a_weight_that_is_tied_into_a_branch_keeps_another_name(tmp_path: Path) -> None:
    parts = ["exit.out", "exit.middle.bias"]
    exported = export_small(
        trained(Tied()),
        tmp_path,
        options=QUICK,
        training_only=parts,
        plain=lambda: Tied(branch=False),
    )

    assert exported.certificate.proof == "three-way"
