"""The state of a rewrite, and the numerical check that a replacement computes what the original computes.

The algebra of a rule proves that two formulas are equal; `assert_equivalent` checks that their code is.
Correct forms differ by about 1e-13 in float64. A wrong number of iterations, a shifted index or a scale that
is applied twice causes a difference that is larger by orders of magnitude. Inputs are the activations of the
probe images, and random tensors of the same shapes, because real covariances are symmetric and would hide a
transposed layout.

`--autotune` chooses between equivalent forms by timing them. Each form is exported alone, and the forms run
in turn on one thread, at batch 1 and at the bundle's optimum batch. Process time is measured, which other
load on the machine affects least.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn
from torch.export import Dim

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.config import StrictModel
from sopdeploy.errors import LoweringError
from sopdeploy_export.graph import OPSET, InFloat64, export

TOLERANCE = 1e-9  # relative to the largest value; correct forms differ by 1e-15 to 1e-12

RUNS, WARMUPS = 15, 3  # of `--autotune`
Build = Callable[[Any], nn.Module]
Cast = Callable[[nn.Module], nn.Module]


def assert_equivalent(
    rule: str, where: str, before: nn.Module, build: Build, inputs: tuple[Tensor, ...]
) -> None:
    """Raise `LoweringError` unless ``build(before)`` equals *before* in float64.

    Args:
        rule: Name of the rewrite rule, for the message.
        where: Name of the part in the network, for the message.
        before: The original part.
        build: Builds the replacement from a copy of the original.
        inputs: Activations of the original: gate weights or vectors (B, N), and feature maps.
    """
    original = copy.deepcopy(before).double().eval()
    replacement = build(copy.deepcopy(original)).eval()
    generator = torch.Generator().manual_seed(0)
    observed = tuple(value.double() for value in inputs)
    synthetic = tuple(  # a random map; gate weights keep their values, in a different order
        value.roll(1, dims=1)
        if value.ndim == 2
        else torch.randn(value.shape, generator=generator, dtype=torch.float64).relu()
        for value in observed
    )
    with torch.no_grad(), InFloat64():
        for given in (observed, synthetic):
            expected, found = original(*given), replacement(*given)
            if found.shape != expected.shape:
                shapes = f"from {tuple(expected.shape)} to {tuple(found.shape)}"
                raise LoweringError(
                    f"rule {rule!r} at {where}: changes the output shape {shapes}; nothing was written"
                )
            scale = max(float(expected.abs().max()), torch.finfo(torch.float64).tiny)
            difference = float((found - expected).abs().max()) / scale
            if not difference <= TOLERANCE:
                raise LoweringError(
                    f"rule {rule!r} at {where}: changes the output by {difference:.2g} of its largest value "
                    "in float64; nothing was written (--no-lowering exports without rewrite rules)"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Activation:
    """Inputs and output of the first call of one part, and the number of calls."""

    inputs: tuple[Tensor, ...]
    output: Tensor
    times: int


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Find the fastest of several forms; *cast* places the casts of the exported precision in each form."""

    batch: BatchRange
    cast: Cast

    def fastest(self, forms: dict[str, nn.Module], inputs: tuple[Tensor, ...]) -> str:
        """Return the name of the form with the smallest product of its median times over the batch sizes."""
        sessions = {name: open_form(self.cast(form), inputs) for name, form in forms.items()}
        arrays = [value.float().numpy() for value in inputs]
        scores = dict.fromkeys(sessions, 1.0)
        for size in sorted({1, self.batch.optimum}):
            feeds = [array[np.arange(size) % len(array)] for array in arrays]
            seconds: dict[str, list[float]] = {name: [] for name in sessions}
            for run in range(WARMUPS + RUNS):
                for name, session in sessions.items():
                    named = dict(zip((given.name for given in session.get_inputs()), feeds, strict=True))
                    start = time.process_time()
                    session.run(None, named)
                    if run >= WARMUPS:
                        seconds[name].append(time.process_time() - start)
            for name, taken in seconds.items():
                scores[name] *= statistics.median(taken)
        return min(scores, key=lambda name: scores[name])


def open_form(form: nn.Module, inputs: tuple[Tensor, ...]) -> ort.InferenceSession:
    """Export *form* alone for any batch size, and open it in ONNX Runtime on one thread."""
    batch = Dim("batch", min=1)
    program = export(form, inputs, tuple({0: batch} for _ in inputs))
    converted = torch.onnx.export(
        program, (), dynamo=True, opset_version=OPSET, external_data=False, verbose=False
    )
    if converted is None:
        raise LoweringError("no ONNX form: the converter returned nothing")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    raw = converted.model_proto.SerializeToString()
    return ort.InferenceSession(raw, options, providers=["CPUExecutionProvider"])


class AppliedRule(StrictModel):
    """A rule that was applied to the part *where*, with the checked precondition and the effect."""

    name: str
    where: str
    precondition: str
    effect: str


class Choice(StrictModel):
    """The form that was chosen for the part *where* from the forms *among*.

    *by* is "rule of thumb" or "autotune". Timings are not stored, so that two exports write the same bytes.
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
        """Number of parts to which each rule was applied, in the order of application."""
        counts: dict[str, int] = {}
        for rule in self.rules:
            counts[rule.name] = counts.get(rule.name, 0) + 1
        return counts


@dataclass(kw_only=True, slots=True)
class RewriteContext:
    """The network that rules rewrite in place, and the record of their rewrites.

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

    def report(self, name: str, where: str, precondition: str, effect: str) -> None:
        """Record that rule *name* was applied to the part *where*."""
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
