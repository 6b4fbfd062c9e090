"""The network that the rules rewrite: a copy of the certified one, what its parts saw, what was done."""

import copy
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

from sopdeploy.manifest import BatchRange
from sopdeploy_export.lowering.equality import Build, prove
from sopdeploy_export.lowering.observe import Call
from sopdeploy_export.lowering.report import AppliedRule, Choice

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
class Work:
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
