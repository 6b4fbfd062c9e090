"""The state of a rewrite: the network, its activations, and the report of the rules that were applied."""

import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.config import StrictModel
from sopdeploy.layers.export_hints import export_hints
from sopdeploy_export.rewrites.equivalence import Activation, Build, assert_equivalent


class AppliedRule(StrictModel):
    """One rule at one place of the network: the precondition that was checked and what the rule changed."""

    name: str
    where: str
    precondition: str
    effect: str


class Choice(StrictModel):
    """Which of several equivalent forms of a part was chosen: *by* "rule of thumb" or "autotune".

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


class Forms(NamedTuple):
    """Equivalent forms of one part by name, the heuristic's choice, and the inputs of the part."""

    built: dict[str, nn.Module]
    default: str
    inputs: tuple[Tensor, ...]


class Chooser(Protocol):
    """Chooses one of several equivalent forms."""

    @property
    def by(self) -> str:
        """Name of the method, for the report."""

    def __call__(self, forms: Forms) -> str:
        """Choose one of *forms* by name."""


@dataclass(kw_only=True, slots=True)
class RewriteContext:
    """The network that rules rewrite in place, and what they did.

    Attributes:
        network: A copy of the certified network.
        activations: Inputs and output of each part, by name, before any rewrite.
        batch: Batch range of the bundle.
        choose: Chooses between equivalent forms.
        rules: The rules applied so far.
        choices: The forms chosen so far.
        changed: Whether a rule has replaced a part.
    """

    network: nn.Module
    activations: dict[str, Activation]
    batch: BatchRange
    choose: Chooser
    rules: list[AppliedRule] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    changed: bool = False

    def parts(self, attribute: str, name: str) -> list[tuple[str, Any]]:
        """List the parts that were called and whose *attribute* (an export hint) is or contains *name*."""
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
        """Replace the part *where* by ``build(part)`` after checking that both are equivalent."""
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
        part, inputs = self.network.get_submodule(where), self.activations[where].inputs
        built = {name: build(copy.deepcopy(part)).eval() for name, build in forms.items()}
        form = self.choose(Forms(built, default, inputs))
        choice = Choice(where=where, form=form, among=tuple(forms), by=self.choose.by)
        self.choices.append(choice)
        return forms[form], choice
