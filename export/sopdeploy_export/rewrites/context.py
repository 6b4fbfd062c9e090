"""The network that the rules rewrite: a copy of the certified one, what its parts saw, what was done."""

import copy
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.config import StrictModel
from sopdeploy_export.rewrites.equivalence import Build, Call, prove


class AppliedRule(StrictModel):
    """A rule at one place of the network: what it needed, found true there, and what it changed."""

    name: str
    where: str
    precondition: str
    effect: str


class Choice(StrictModel):
    """One of several equal forms: which it is, among which, and who chose, a rule of thumb or the clock.

    The clock's figures are not kept: a bundle holds nothing that another export would not repeat.
    """

    where: str
    form: str
    among: tuple[str, ...]
    by: str


class LoweringReport(StrictModel):
    """What `lowering.json` holds.

    `certified_root` is the root of the graph that the certificate speaks of, `lowered_root` that of the
    graph that was written as ONNX; they are equal where no rule changed the graph. `textbook` says that
    the formulas of the papers were written instead, for comparison.
    """

    textbook: bool
    rules: tuple[AppliedRule, ...]
    choices: tuple[Choice, ...]
    certified_root: str
    lowered_root: str

    @property
    def summary(self) -> dict[str, int]:
        """Return how often each rule was applied, in the order of the rules."""
        counts: dict[str, int] = {}
        for rule in self.rules:
            counts[rule.name] = counts.get(rule.name, 0) + 1
        return counts


Part = TypeVar("Part", bound=nn.Module)


class Forms(NamedTuple):
    """Equal forms of one part, by name; which of them the rule of thumb takes; what the part was given."""

    built: dict[str, nn.Module]
    thumb: str
    inputs: tuple[Tensor, ...]


class Chooser(Protocol):
    """Picks one of several equal forms."""

    @property
    def by(self) -> str:
        """Return who chooses: a rule of thumb or the clock."""

    def __call__(self, forms: Forms) -> str:
        """Return the name of one of them."""


@dataclass(kw_only=True, slots=True)
class RewriteContext:
    """`calls` holds what each part saw, by name; `changed` says whether the graph is another one by now."""

    network: nn.Module
    calls: dict[str, Call]
    batch: BatchRange
    choose: Chooser
    rules: list[AppliedRule] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    changed: bool = False

    def parts(self, kind: type[Part]) -> list[tuple[str, Part]]:
        """Return the parts of exactly this *kind* that were called, by name."""
        return [
            (name, part)
            for name, part in self.network.named_modules()
            if isinstance(part, kind) and type(part) is kind and name in self.calls
        ]

    def note(self, name: str, where: str, precondition: str, effect: str) -> None:
        """Write down a rule that holds at *where*."""
        self.rules.append(AppliedRule(name=name, where=where, precondition=precondition, effect=effect))

    def replace(self, rule: str, where: str, build: Build) -> None:
        """Put ``build(part)`` in the place of the part *where*, after proving that both are equal."""
        part = self.network.get_submodule(where)
        prove(rule, where, part, build, self.calls[where].inputs)
        self.put(where, build(part))

    def put(self, where: str, part: nn.Module) -> None:
        """Put *part* into the network at *where*."""
        owner, _, leaf = where.rpartition(".")
        self.network.get_submodule(owner).register_module(leaf, part.eval())
        self.changed = True

    def pick(self, where: str, forms: dict[str, Build], thumb: str) -> Build:
        """Return one of several builds of the part at *where*, and write down which."""
        part, inputs = self.network.get_submodule(where), self.calls[where].inputs
        built = {name: build(copy.deepcopy(part)).eval() for name, build in forms.items()}
        form = self.choose(Forms(built, thumb, inputs))
        self.choices.append(Choice(where=where, form=form, among=tuple(forms), by=self.choose.by))
        return forms[form]
