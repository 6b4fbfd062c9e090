"""What a lowering did: one line per rule and place, and the roots before and after."""

from sopdeploy.frozen import Frozen


class AppliedRule(Frozen):
    """A rule at one place of the network: what it needed, found true there, and what it changed."""

    name: str
    where: str
    precondition: str
    effect: str


class Choice(Frozen):
    """One of several equal forms: which it is, among which, and who chose, a rule of thumb or the clock.

    The clock's figures are not kept: a bundle holds nothing that another export would not repeat.
    """

    where: str
    form: str
    among: tuple[str, ...]
    by: str


class LoweringReport(Frozen):
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
