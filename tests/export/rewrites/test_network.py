"""The rules on whole networks: what applies where, what is exported, and which errors are caught."""

import ast
import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import sopdeploy_export
from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import LoweringError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.attention.gsop_attention import Excitation
from sopdeploy.layers.attention.gsop_block import RELEASED_BLOCK, GSoPBlock, GSoPBlockConfig
from sopdeploy.layers.export_hints import ExportHints
from sopdeploy.models.base import Classifier
from sopdeploy_export.pipeline import Exported, ExportOptions, export
from sopdeploy_export.proof.hashes import onnx_root
from sopdeploy_export.proof.networks import detach
from sopdeploy_export.rewrites import apply, attention, linear, mixture, newton_schulz
from sopdeploy_export.rewrites.apply import apply_rules, record_activations, rewrite
from sopdeploy_export.rewrites.context import RewriteContext
from sopdeploy_export.rewrites.mixture import GatheredWeights
from sopdeploy_export.rewrites.newton_schulz import LoweredRoot
from tests.export.conftest import save, trained

Make = Callable[..., Classifier]
SMALL = BatchRange(optimum=2, maximum=4)
MIXTURE = {
    "components": 4,
    "chosen": 2,
    "component_widths": (12, 8),
    "gate_widths": (12, 8),
    "blocks_per_stage": 1,
}
NAMES = {
    "gmsop": ("gmsop-16-8-resnet18", MIXTURE),
    "gmgap": (
        "gmgap-16-8-resnet18",
        {**MIXTURE, "component_bias": True, "component_norm": True, "evaluation": "dense"},
    ),
    "averaged": (
        "avesop-16-resnet18",
        {
            "components": 3,
            "component_widths": (6,),
            "iterations": 2,
            "blocks_per_stage": 1,
            "conv5_stride": 1,
        },
    ),
    "isqrt": ("isqrt-resnet8", {"pooling": {"kind": "isqrt", "width": 8}}),
    "plain": ("resnet8", {}),
}
EXPECTED = {
    "gmsop": {
        (mixture.NAME, "mixture"),
        (mixture.TRIANGLE, "mixture"),
        (newton_schulz.NAME, "mixture.after"),
        (newton_schulz.NAME, "gate.feature.2"),
        (linear.FUSION_NORM, "head"),
    },
    "gmgap": {(mixture.NAME, "mixture"), (linear.FUSION_NORM, "head")},
    "averaged": {(newton_schulz.NAME, "mixture.after")},
    "isqrt": {(newton_schulz.NAME, "pooling.root"), (newton_schulz.CENTERING, "pooling.root")},
    "plain": set(),
}


def network(make: Make, which: str) -> Classifier:
    name, config = NAMES[which]
    made = make(name, **config)
    for part in made.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
            nn.init.normal_(part.running_mean, std=0.2)
    if which.startswith("gm"):
        for bias in made.get_submodule("mixture").biases:
            nn.init.normal_(bias)
        nn.init.normal_(made.get_parameter("gate.weight"))
        return detach(made)
    return made


def pixels() -> Tensor:
    torch.manual_seed(3)
    return torch.randn(2, 3, 32, 32)


def context_for(part: nn.Module, inputs: tuple[Tensor, ...]) -> RewriteContext:
    activations = record_activations(part, inputs)
    return RewriteContext(network=part, activations=activations, batch=SMALL)


@pytest.mark.parametrize("which", EXPECTED)
def test_rules_are_reported_with_place_and_precondition(make: Make, which: str) -> None:
    found = rewrite(network(make, which), pixels(), SMALL)
    assert EXPECTED[which] <= {(rule.name, rule.where) for rule in found.rules}
    assert all(rule.precondition and rule.effect for rule in found.rules)
    assert found.changed == bool(EXPECTED[which])


def test_scale_moves_after_the_classifier_except_in_the_gram_domain(make: Make) -> None:
    few_channels = rewrite(network(make, "isqrt"), pixels(), SMALL)
    assert [rule.where for rule in few_channels.rules if rule.name == linear.COMPENSATION] == ["fc"]
    gram = rewrite(make("isqrt-resnet8"), pixels()[:, :, :16, :16], SMALL)
    names = {rule.name for rule in gram.rules}
    assert newton_schulz.GRAM in names
    assert linear.COMPENSATION not in names


def test_certified_network_does_not_change(make: Make) -> None:
    certified = network(make, "gmsop")
    before = {name: type(part) for name, part in certified.named_modules()}
    rewrite(certified, pixels(), SMALL)
    assert {name: type(part) for name, part in certified.named_modules()} == before
    assert not any(part._forward_hooks for part in certified.modules())


def test_second_rewrite_finds_nothing_to_do(make: Make) -> None:
    once = rewrite(network(make, "gmsop"), pixels(), SMALL).network
    assert not [part for part in once.modules() if isinstance(part, nn.BatchNorm1d)]
    again = rewrite(once, pixels(), SMALL)
    assert not again.changed
    assert again.rules == []


def test_gate_with_more_weights_than_declared_is_rejected(make: Make) -> None:
    certified = network(make, "gmsop")
    certified.get_submodule("gate").chosen = 3
    with pytest.raises(LoweringError, match="mixture: 3 of 4 weights are not 0, but the mixture uses K = 2"):
        rewrite(certified, pixels(), SMALL)


def one_step_less(self: LoweredRoot, before: nn.Module) -> None:
    nn.Module.__init__(self)
    self.config = before.config.model_copy(update={"iterations": before.config.iterations - 1})
    self.register_buffer("triangle", before.triangle)


def shifted_experts(self: GatheredWeights, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return mixture.ProjectedThenGathered.evaluate(self, x, weights.roll(1, dims=1))


@pytest.mark.parametrize(
    ("which", "owner", "method", "wrong", "message"),
    [
        (
            *("isqrt", LoweredRoot, "__init__", one_step_less),
            r"Newton-Schulz in 3N-3 products.*pooling\.root.*changes",
        ),
        ("gmsop", GatheredWeights, "evaluate", shifted_experts, "'K of N experts' at mixture: changes"),
    ],
)
def test_wrong_rule_stops_the_rewrite_and_is_named(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    which: str,
    owner: type,
    method: str,
    wrong: Callable,
    message: str,
) -> None:
    monkeypatch.setattr(owner, method, wrong)
    with pytest.raises(LoweringError, match=message):
        rewrite(network(make, which), pixels(), SMALL)


@pytest.mark.parametrize("released", [False, True], ids=["the paper's block", "the released block"])
def test_rules_of_a_gsop_block_hold_and_the_released_constant_does_not_center(released: bool) -> None:
    torch.manual_seed(0)
    config = GSoPBlockConfig(attention="average", cov_width=32, **(RELEASED_BLOCK if released else {}))
    block = nn.Sequential(GSoPBlock(config, 64, 1)).eval()
    maps = torch.randn(2, 64, 7, 7)
    with torch.no_grad():
        expected = block(maps)
        context = context_for(block, (maps,))
        apply_rules(context)
        torch.testing.assert_close(block(maps), expected, rtol=1e-5, atol=1e-6)
    names = [rule.name for rule in context.rules]
    for name in (attention.FOLD, attention.FORM, attention.CENTERING):
        assert names.count(name) == 2
    assert names.count(attention.POSITION) == 1
    centering = [rule for rule in context.rules if rule.name == attention.CENTERING]
    (position,) = (rule for rule in centering if rule.where.endswith("position"))
    assert ("not centering" in position.effect) == released
    assert not [part for part in block.modules() if isinstance(part, Excitation)]


class Doubled(nn.Module, ExportHints):
    """A layer that the exporter has never seen."""

    rewrite_rules = ("halve",)

    def forward(self, x: Tensor) -> Tensor:
        return x + x


class Product(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def test_new_layer_is_rewritten_by_the_rule_that_it_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    def rule(context: RewriteContext, where: str, _part: Doubled) -> None:
        context.replace("halve", where, lambda _: Product())

    inputs = (torch.ones(2, 3),)
    context = context_for(nn.Sequential(Doubled()), inputs)
    with pytest.raises(LoweringError, match="Doubled declares an unknown rewrite rule: halve"):
        apply_rules(context)
    monkeypatch.setitem(apply.RULES, "halve", rule)
    apply_rules(context)
    assert isinstance(context.network[0], Product)
    assert context.changed


def test_exporter_imports_no_paper() -> None:
    folder = Path(sopdeploy_export.__file__).parent
    allowed = {"base", "registry", "stats"}
    for module in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sopdeploy.models."):
                assert str(node.module).split(".")[2] in allowed, f"{module.name} imports {node.module}"


def test_lowering_json_records_both_roots_and_every_rule(gated: Exported) -> None:
    written = json.loads((gated.path / "lowering.json").read_text())
    assert written == gated.lowering.model_dump(mode="json")
    assert written["certified_root"] == gated.certificate.roots.any_batch
    assert written["lowered_root"] != written["certified_root"]
    assert gated.manifest.lineage.onnx_root == onnx_root(onnx.load(gated.path / "model.onnx"))
    assert gated.manifest.lineage.program_root == written["certified_root"]
    assert gated.parity.passed
    assert mixture.NAME in gated.lowering.summary


@pytest.fixture(scope="module")
def mixture_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, config = NAMES["gmsop"]
    made = trained(name, **config)
    nn.init.normal_(made.get_parameter("gate.weight"))
    return save(made, name, tmp_path_factory.mktemp("run") / "ckpt.pt", Preprocess(resize=32, crop=32))


@pytest.mark.slow
def test_second_export_of_a_mixture_gives_the_same_bytes(mixture_checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions(detach=True, batch=SMALL)
    once, again = (export(mixture_checkpoint, tmp_path / name, options) for name in ("once", "again"))
    assert (again.path / "model.onnx").read_bytes() == (once.path / "model.onnx").read_bytes()
    assert again.path.name == once.path.name


@pytest.mark.slow
def test_no_lowering_exports_the_reference_formulas(mixture_checkpoint: Path, tmp_path: Path) -> None:
    found = export(mixture_checkpoint, tmp_path, ExportOptions(detach=True, batch=SMALL, lowering=False))
    assert found.lowering.textbook
    assert set(found.lowering.summary) == {apply.REFERENCE}
    assert "TopK" not in found.parity.operators
    assert found.parity.passed


@pytest.mark.slow
def test_autotune_chooses_one_of_the_equivalent_forms(mixture_checkpoint: Path, tmp_path: Path) -> None:
    found = export(mixture_checkpoint, tmp_path, ExportOptions(detach=True, batch=SMALL, autotune=True))
    (choice,) = found.lowering.choices
    assert (choice.where, choice.by) == ("mixture", "autotune")
    assert choice.form in choice.among
    assert found.parity.passed
