"""The state of a rewrite: network, activations and applied rules."""

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.config import StrictModel
from sopdeploy.layers.export_hints import export_hints
from sopdeploy_export.rewrites.autotune import Benchmark
from sopdeploy_export.rewrites.equivalence import Activation, Build, assert_equivalent


class AppliedRule(StrictModel):
    """One rule at one place: the precondition that was checked, and the effect."""

    name: str
    where: str
    precondition: str
    effect: str


class Choice(StrictModel):
    """The chosen form of a part, *by* "rule of thumb" or "autotune".

    Timings are not stored, so that two exports write the same bytes.
    """

    where: str
    form: str
    among: tuple[str, ...]
    by: str


class LoweringReport(StrictModel):
    """The content of `lowering.json`.

    Attributes:
        textbook: The formulas of the papers were exported, without rewrite rules, for comparison.
        rules: The rules in the order in which they were applied.
        choices: The forms that were chosen.
        certified_root: Merkle root of the program that the certificate covers.
        lowered_root: Merkle root of the program that was converted to ONNX; the same if no rule changed it.
    """

    textbook: bool
    rules: tuple[AppliedRule, ...]
    choices: tuple[Choice, ...]
    certified_root: str
    lowered_root: str

    @property
    def summary(self) -> dict[str, int]:
        """Number of places where each rule was applied, in the order of the rules."""
        counts: dict[str, int] = {}
        for rule in self.rules:
            counts[rule.name] = counts.get(rule.name, 0) + 1
        return counts


@dataclass(kw_only=True, slots=True)
class RewriteContext:
    """The network that rules rewrite in place, and what they did.

    Attributes:
        network: A copy of the certified network.
        activations: Inputs and output of each part, by name, before any rewrite.
        batch: Batch range of the bundle.
        benchmark: Chooses between equivalent forms by timing them; `None` chooses the default form.
        rules: The rules applied so far.
        choices: The forms chosen so far.
        changed: Whether a rule has replaced a part.
    """

    network: Any
    activations: dict[str, Activation]
    batch: BatchRange
    benchmark: Benchmark | None = None
    rules: list[AppliedRule] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    changed: bool = False

    def parts(self, attribute: str, name: str) -> list[tuple[str, Any]]:
        """List the called parts whose export hint *attribute* is or contains *name*."""
        found = []
        for where, part in self.network.named_modules():
            declared = getattr(export_hints(part), attribute) or ()
            if where in self.activations and name in (
                declared if isinstance(declared, tuple) else (declared,)
            ):
                found.append((where, part))
        return found

    def report(self, name: str, where: str, precondition: str, effect: str) -> None:
        """Add a rule that holds at *where* to the report."""
        self.rules.append(AppliedRule(name=name, where=where, precondition=precondition, effect=effect))

    def replace(self, rule: str, where: str, build: Build) -> None:
        """Replace the part *where* by ``build(part)`` after checking equivalence."""
        part = self.network.get_submodule(where)
        assert_equivalent(rule, where, part, build, self.activations[where].inputs)
        self.put(where, build(part))

    def put(self, where: str, part: nn.Module) -> None:
        """Put *part* into the network at *where* without a check."""
        owner, _, leaf = where.rpartition(".")
        self.network.get_submodule(owner).register_module(leaf, part.eval())
        self.changed = True

    def choose_form(self, where: str, forms: dict[str, Build], default: str) -> tuple[Build, Choice]:
        """Choose one of several *forms* of the part *where* and report the choice."""
        form, by = default, "rule of thumb"
        if self.benchmark is not None:
            part = self.network.get_submodule(where)
            built = {name: build(copy.deepcopy(part)).eval() for name, build in forms.items()}
            form, by = self.benchmark.fastest(built, self.activations[where].inputs), "autotune"
        choice = Choice(where=where, form=form, among=tuple(forms), by=by)
        self.choices.append(choice)
        return forms[form], choice
