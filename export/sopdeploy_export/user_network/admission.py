"""The admission of a network of the user: what must hold before the proof, and what can be removed.

`export_network` and `sopdeploy inspect` both call `admit`, so the command that `inspect` prints
is refused for nothing that it could know. What the proof decides, such as whether a hook
matters, is left to the proof.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from torch.export import ExportedProgram

from sopdeploy.errors import CertificateError, ConfigError, LoweringError, shorten
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import is_in
from sopdeploy.names import label_problem
from sopdeploy_export.admit.first_run import (
    create_buffers,
    prepared_in_place,
    turn_into_attributes,
)
from sopdeploy_export.admit.network import (
    check_exportable,
    checked_copy,
    tensors_with_nan,
    unwrap,
    unwrap_and_check,
)
from sopdeploy_export.admit.outputs import (
    check_ends_in_logits,
    check_first_runs,
    check_unchanged_by_run,
)
from sopdeploy_export.admit.state import check_torch_state, find_oddity
from sopdeploy_export.admit.written import check_unread
from sopdeploy_export.capture.deployed import Deployed, probe_pixels
from sopdeploy_export.capture.program import Captures
from sopdeploy_export.detach.detach import detach
from sopdeploy_export.network import copy_network, tensors, with_contiguous_tensors
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.prove.copy import prove_copy
from sopdeploy_export.prove.tensors import (
    check_removed_memory,
    needed_tensors,
    outermost_unneeded,
)
from sopdeploy_export.state import NOT_IN_EVAL, attributes_restored
from sopdeploy_export.user_network.parts import match_parts, removable_parts


@dataclass(frozen=True, kw_only=True, slots=True)
class Admitted:
    """A network of the user that passed all checks before the proof.

    Attributes:
        given: The network of the user, unwrapped.
        network: The copy of it that is exported.
        parts: The outermost parts to remove.
        captures: The programs of both.
        num_classes: The number of its logits.
        written: The attributes that each run writes and no run reads.
        removable: The further parts that no output depends on, and that can be removed.
        warnings: Findings that do not stop the export.
    """

    given: nn.Module
    network: nn.Module
    parts: tuple[str, ...]
    captures: Captures
    num_classes: int
    written: tuple[str, ...]
    removable: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def program(self) -> ExportedProgram:
        """Its program, as torch.export made it."""
        return self.captures.of(self.network).traced


def admit(
    network: nn.Module,
    preprocess: Preprocess,
    *,
    classes: int | None = None,
    training_only: Sequence[str] = (),
    logits_key: str | int | None = None,
    options: ExportOptions | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> Admitted:
    """Check everything about *network* that needs no proof, and find the parts that its output does not need.

    Without *classes*, it may have any number of logits. The other arguments are those of
    `export_network`; the caller preserves *network*. Raises `DetachError` for *training_only*,
    and `LoweringError` or `CertificateError` for *network*.
    """
    options = ExportOptions() if options is None else options
    check_torch_state()
    given = unwrap_and_check(network, "trained")
    parts = match_parts(given, training_only)
    check_exportable(given, parts)
    copied = with_contiguous_tensors(checked_copy(given, "trained", logits_key, parts))
    given_tensors = tensors(given)  # those of the copy no longer share memory
    check_removed_memory(
        {name: tensor for name, tensor in given_tensors.items() if is_in(name, *parts)},
        {name: tensor for name, tensor in given_tensors.items() if not is_in(name, *parts)},
    )
    captures = Captures(preprocess, options.batch)
    created = create_buffers(copied, preprocess)
    if broken := tensors_with_nan(copied, parts):
        needed = needed_tensors(copied, captures.of(copied).needed)
        if needed.intersection(broken):
            problem = "holds NaN or infinite values; train again or use an earlier checkpoint"
            raise LoweringError(f"{next(name for name in broken if name in needed)} {problem}")
    trial = Deployed(copy_network(copied), preprocess).eval()  # its runs can fill caches
    filled, written, warnings = check_first_runs(trial, preprocess, classes, "trained")
    on_step("checking the network, its graph")
    with prepared_in_place(given, logits_key, preprocess):
        capture = prove_copy(
            given,
            copied,
            captures,
            classes,
            parts,
            with_features=options.with_features,
        )
    if filled is not None:
        check_unchanged_by_run(filled, capture, captures.of(trial.network))
    if written:
        check_unread(trial, written, preprocess, options.batch, capture)
    if created:
        unrun = with_contiguous_tensors(checked_copy(given, "trained", logits_key, parts))
        turn_into_attributes(unrun, created)
        check_unchanged_by_run(created[0], captures.of(unrun), capture)
    check_ends_in_logits(capture.program)
    needed = needed_tensors(copied, capture.needed)
    if reached := sorted(name for name in needed if is_in(name, *parts)):
        raise CertificateError(
            f"the output of the trained network depends on {shorten(reached)}; omit what holds them",
            setting="training_only",
        )

    def check_without(removed: tuple[str, ...]) -> None:
        _check_without(removed, copied, preprocess, classes, written)

    if parts:
        check_without(parts)
    undeclared = outermost_unneeded(copied, needed, parts)
    # The logits are the first output
    logits, *_ = capture.program.graph.output_node().args[0]
    return Admitted(
        given=given,
        network=copied,
        parts=parts,
        captures=captures,
        num_classes=logits.meta["val"].shape[1],
        written=written,
        removable=removable_parts(copied, undeclared, check_without, parts),
        warnings=warnings,
    )


def _check_without(
    removed: tuple[str, ...],
    network: nn.Module,
    preprocess: Preprocess,
    classes: int | None,
    written: tuple[str, ...],
) -> None:
    """Check that *network* without *removed* parts runs, and changes no other attributes than *written*."""
    detached = detach(network, removed, probe_pixels(network, preprocess))
    runs = check_first_runs(
        Deployed(detached, preprocess).eval(), preprocess, classes, "detached"
    )
    if other := [name for name in runs.written if name not in written]:
        raise CertificateError(
            f"{other[0]} changes while the detached network runs; {NOT_IN_EVAL}"
        )


def check_labels(labels: Sequence[str]) -> None:
    """Raise `ConfigError` unless *labels* are the names of classes, each once."""
    are_names = bool(labels) and all(isinstance(label, str) for label in labels)
    if not are_names or len(set(labels)) != len(labels):
        raise ConfigError("give one name per class, each once", setting="labels")
    if problem := label_problem(labels):
        raise ConfigError(f"{problem}; rename the class", setting="labels")


@contextmanager
def naming_oddity(network: nn.Module, training_only: Sequence[str]) -> Iterator[None]:
    """Restore *network* after the block, and say what is odd in its code if the block refuses it.

    A hook, a replaced method or a part in train mode is no reason to refuse a network, but can
    be the cause of one, such as another graph after the first run.
    """
    given: object = unwrap(network)
    if not isinstance(given, nn.Module):
        yield
        return
    with attributes_restored(given):
        odd = find_oddity(given.eval(), "trained", match_parts(given, training_only))
        try:
            yield
        except (CertificateError, LoweringError) as error:
            if odd is not None:
                error.message += f"; one reason can be that {odd}"
            raise


def unused_modules(
    network: nn.Module, preprocess: Preprocess, logits_key: str | int | None = None
) -> tuple[str, ...]:
    """Name the outermost modules of *network* that its output in eval mode does not depend on.

    `training_only` may name them. *logits_key* is the attribute, key or index of the logits, if
    the network returns more than one tensor. Raises the errors of `export_network` before its
    proof begins.
    """
    with naming_oddity(network, ()):
        return admit(network, preprocess, logits_key=logits_key).removable
