"""The rules on whole networks: what is applied where, what ships, and what is caught on the way."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.checkpoint import Checkpoint, write_checkpoint
from sopdeploy.errors import LoweringError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.attention.gsop_attention import Excitation
from sopdeploy.layers.attention.gsop_block import RELEASED_BLOCK, GSoPBlock, GSoPBlockConfig
from sopdeploy.models.base import Classifier
from sopdeploy_export.detach import detach
from sopdeploy_export.pipeline import Exported, ExportOptions, export
from sopdeploy_export.proof.onnx_hash import file_root
from sopdeploy_export.rewrites import attention as row_conv
from sopdeploy_export.rewrites import linear as fusion_norm
from sopdeploy_export.rewrites import mixture as routing
from sopdeploy_export.rewrites import newton_schulz as root
from sopdeploy_export.rewrites.apply import RULES, rewrite
from sopdeploy_export.rewrites.autotune import Heuristic
from sopdeploy_export.rewrites.context import RewriteContext
from sopdeploy_export.rewrites.equivalence import record_activations
from sopdeploy_export.rewrites.mixture import GatheredWeights
from sopdeploy_export.rewrites.newton_schulz import LoweredRoot

Make = Callable[..., Classifier]
SMALL = BatchRange(optimum=2, maximum=4)
TINY_MIXTURE = {
    "components": 4,
    "chosen": 2,
    "component_widths": (12, 8),
    "gate_widths": (12, 8),
    "blocks_per_stage": 1,
}
NAMES = {
    "gmsop": ("gmsop-16-8-resnet18", TINY_MIXTURE),
    "isqrt": ("isqrt-resnet8", {"pooling": {"kind": "isqrt", "width": 8}}),
    "plain": ("resnet8", {}),
}


def network(make: Make, which: str) -> Classifier:
    name, config = NAMES[which]
    made = make(name, **config)
    for part in made.modules():
        if isinstance(part, nn.BatchNorm1d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
            nn.init.normal_(part.running_mean, std=0.2)
    if which == "gmsop":
        nn.init.normal_(made.get_parameter("gate.weight"))
        return detach(made)
    return made


def pixels() -> Tensor:
    torch.manual_seed(3)
    return torch.randn(2, 3, 32, 32)


EXPECTED = {
    "gmsop": {
        (routing.NAME, "mixture"),
        (routing.TRIANGLE, "mixture"),
        (root.NAME, "mixture.after"),
        (root.NAME, "gate.feature.2"),
        (fusion_norm.NAME, "head"),
    },
    "isqrt": {(root.NAME, "pooling.root"), (root.CENTRING, "pooling.root")},
    "plain": set(),
}


@pytest.mark.parametrize("which", EXPECTED)
def test_the_rules_that_apply_are_reported_with_place_and_precondition(make: Make, which: str) -> None:
    found = rewrite(network(make, which), pixels(), SMALL)
    assert EXPECTED[which] <= {(rule.name, rule.where) for rule in found.rules}
    assert all(rule.precondition and rule.effect for rule in found.rules)
    assert found.changed == bool(EXPECTED[which])


def test_the_scale_moves_behind_the_classifier_only_where_it_costs_something(make: Make) -> None:
    behind = "post-compensation behind the linear layer"
    few_channels = rewrite(network(make, "isqrt"), pixels(), SMALL)
    assert [rule.where for rule in few_channels.rules if rule.name == behind] == ["fc"]
    gram = rewrite(make("isqrt-resnet8"), pixels()[:, :, :16, :16], SMALL)
    assert root.GRAM in {rule.name for rule in gram.rules}
    assert behind not in {rule.name for rule in gram.rules}


def test_the_certified_network_stays_as_it_was(make: Make) -> None:
    certified = network(make, "gmsop")
    before = {name: type(part) for name, part in certified.named_modules()}
    rewrite(certified, pixels(), SMALL)
    assert {name: type(part) for name, part in certified.named_modules()} == before
    assert not any(part._forward_hooks for part in certified.modules())


def test_a_fold_leaves_no_norm_to_fold_again(make: Make) -> None:
    once = rewrite(network(make, "gmsop"), pixels(), SMALL).network
    assert not [part for part in once.modules() if isinstance(part, nn.BatchNorm1d)]
    again = rewrite(once, pixels(), SMALL)
    assert not again.changed
    assert again.rules == ()


def test_a_gate_that_keeps_more_than_it_says_is_refused(make: Make) -> None:
    certified = network(make, "gmsop")
    certified.get_submodule("gate").chosen = 3
    with pytest.raises(LoweringError, match="mixture: 3 of 4 weights are not 0, but K = 2"):
        rewrite(certified, pixels(), SMALL)


def one_step_less(self: LoweredRoot, before: nn.Module) -> None:
    nn.Module.__init__(self)
    self.config = before.config.model_copy(update={"iterations": before.config.iterations - 1})
    self.register_buffer("triangle", before.triangle)


def test_a_sabotaged_rule_stops_the_rewriting_and_is_named(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoweredRoot, "__init__", one_step_less)
    with pytest.raises(LoweringError, match=r"Newton-Schulz in 3N-3 products.*pooling\.root.*changes"):
        rewrite(network(make, "isqrt"), pixels(), SMALL)


def test_a_shifted_expert_stops_the_rewriting_and_is_named(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = GatheredWeights.evaluate
    monkeypatch.setattr(GatheredWeights, "evaluate", lambda s, x, w: honest(s, x, w.roll(1, dims=1)))
    with pytest.raises(LoweringError, match="'K of N experts' at mixture: changes"):
        rewrite(network(make, "gmsop"), pixels(), SMALL)


@pytest.fixture(scope="module")
def mixture_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.export.conftest import trained

    name, config = NAMES["gmsop"]
    made = trained(name, **config)
    nn.init.normal_(made.get_parameter("gate.weight"))
    path = tmp_path_factory.mktemp("run") / "ckpt.pt"
    write_checkpoint(
        path,
        Checkpoint(
            model=name,
            config=made.config.model_dump(mode="json"),
            weights=made.state_dict(),
            labels=tuple("abcdefghij"),
            preprocess=Preprocess(resize=32, crop=32),
            training={},
        ),
    )
    return path


def test_both_roots_and_every_rule_are_in_the_bundle(gated: Exported) -> None:
    lowered = gated
    written = json.loads((lowered.path / "lowering.json").read_text())
    assert written == lowered.lowering.model_dump(mode="json")
    assert written["certified_root"] == lowered.certificate.roots.any_batch
    assert written["lowered_root"] != written["certified_root"]
    assert lowered.manifest.lineage.onnx_root == file_root(lowered.path / "model.onnx")
    assert lowered.manifest.lineage.program_root == written["certified_root"]
    assert lowered.parity.passed
    assert routing.NAME in lowered.lowering.summary


@pytest.mark.slow
def test_a_second_export_of_a_mixture_gives_the_same_bytes(mixture_checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions(detach=True, batch=SMALL)
    once, again = (export(mixture_checkpoint, tmp_path / name, options) for name in ("once", "again"))
    assert (again.path / "model.onnx").read_bytes() == (once.path / "model.onnx").read_bytes()
    assert again.path.name == once.path.name


@pytest.mark.slow
def test_no_lowering_ships_the_textbook_with_the_same_answer(
    mixture_checkpoint: Path, tmp_path: Path
) -> None:
    found = export(mixture_checkpoint, tmp_path, ExportOptions(detach=True, batch=SMALL, lowering=False))
    assert found.lowering.textbook
    assert set(found.lowering.summary) == {"textbook formula"}
    assert "TopK" not in found.parity.operators
    assert found.parity.passed


@pytest.mark.slow
def test_autotune_chooses_one_of_the_equal_forms_and_says_so(
    mixture_checkpoint: Path, tmp_path: Path
) -> None:
    found = export(mixture_checkpoint, tmp_path, ExportOptions(detach=True, batch=SMALL, autotune=True))
    (choice,) = found.lowering.choices
    assert (choice.where, choice.by) == ("mixture", "autotune")
    assert choice.form in choice.among
    assert found.parity.passed


@pytest.mark.parametrize("released", [False, True], ids=["the paper's block", "the released block"])
def test_every_rule_of_a_gsop_block_holds_and_the_released_constant_is_not_taken_for_centring(
    released: bool,
) -> None:
    torch.manual_seed(0)
    config = GSoPBlockConfig(attention="average", cov_width=32, **(RELEASED_BLOCK if released else {}))
    block = nn.Sequential(GSoPBlock(config, 64, 1)).eval()
    maps = torch.randn(2, 64, 7, 7)
    with torch.no_grad():
        expected = block(maps)
        work = RewriteContext(
            network=block, calls=record_activations(block, (maps,)), batch=SMALL, choose=Heuristic()
        )
        for apply in RULES:
            apply(work)
        torch.testing.assert_close(block(maps), expected, rtol=1e-5, atol=1e-6)
    names = [rule.name for rule in work.rules]
    assert names.count(row_conv.FOLD) == names.count(row_conv.FORM) == names.count(root.CENTRING) == 2
    (constant,) = (r for r in work.rules if r.name == root.CENTRING and r.where.endswith("position"))
    assert ("not centring" in constant.effect) == released
    assert not [part for part in block.modules() if isinstance(part, Excitation)]
