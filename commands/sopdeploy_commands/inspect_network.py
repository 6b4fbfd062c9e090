"""`sopdeploy inspect`: list the parts of a network that its output does not depend on."""

from collections.abc import Callable, Mapping
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from sopdeploy.base.config import StrictModel
from sopdeploy.base.environment import garbage_kept
from sopdeploy.base.names import label_problem
from sopdeploy.cli.command import command, expand_options
from sopdeploy.cli.console import print_field
from sopdeploy.errors import ConfigError, command_line_option, shorten
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.paths import describe_wrong, what_is
from sopdeploy.weights.files import check_is_weights
from sopdeploy_commands.rules import read_preprocess
from sopdeploy_export.options import NetworkExportOptions, NetworkOptions
from sopdeploy_export.user_network.import_path import check_builder

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from sopdeploy_export.capture.program import Trace


CLASS_NAMES_FILE = "labels.txt"
SHOWN_MEMORY = 4_000_000_000  # bytes of memory from which `inspect` names what an export needs


class Inspection(StrictModel):
    """The parts of a network that its output ignores; `command` exports the network without them.

    `table` names the table of weights in the file, `ignored` its tensors that the network does
    not have; `labels` are the class names in the file, if it has one for each logit. `shared`
    says which parts are not unused as a whole, because a tensor in them is also one of the rest.
    `memory_bytes` is an estimate of the memory that an export needs.
    """

    network: str
    num_classes: int
    num_tensors: int
    memory_bytes: int
    table: str
    unused: tuple[str, ...]
    shared: Mapping[str, str]
    command: str
    ignored: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = None
    warnings: tuple[str, ...] = ()


def _show_unused(inspected: Inspection) -> None:
    """Print how many tensors fit, the unused and partly unused parts, and the next command."""
    ignored = f"; ignored: {shorten(inspected.ignored)}" if inspected.ignored else ""
    print_field("weights", f"{inspected.num_tensors} tensors fit{ignored}")
    unused = ", ".join(inspected.unused) or "nothing; the output depends on every part"
    print_field("unused", unused)
    if inspected.memory_bytes > SHOWN_MEMORY:
        needed = f"an export needs at least about {inspected.memory_bytes / 1e9:.1f} GB"
        print_field("memory", needed)
    for part, tensor in inspected.shared.items():
        print_field("", f"not all of {part}: {tensor}", style="dim")

    if inspected.labels is None:
        count = inspected.num_classes
        names = f"if its {count} outputs are logits, write the names of their classes, one per line,"
        if count == 1:  # two names without an option, or a single one with it
            names = "write the name of the class that the logit stands for"
        print_field("next", f"{names} to {CLASS_NAMES_FILE}, then", style="dim")
        print_field("", inspected.command, style="dim")
        if inspected.num_classes == 1:
            other = "of label 0 and of label 1, and omit --several-classes"
            print_field("", f"or write the names of two classes, {other}", style="dim")
    else:
        print_field("next", inspected.command, style="dim")
    for warning in inspected.warnings:
        print_field("warning", warning, style="bold yellow")


@command(
    _show_unused,
    examples=("sopdeploy inspect w.pth --network my_code:build --preprocess rules.json",),
)
@garbage_kept()
@expand_options
def inspect(file: Path, *, options: NetworkOptions) -> Inspection:
    """List the parts of your own network that its output does not depend on, and write nothing.

    An export removes the parts that you name with `--training-only`. The command refuses the
    networks that an export refuses before its proof begins.

    Args:
        file: A weight file.
    """
    if options.network is None:
        if what_is(file) == "bundle":
            problem = describe_wrong(file, "weights", "its README.md describes it")
            raise ConfigError(f"{file}: {problem}")
        raise ConfigError("missing; give package.module:callable", setting="network")

    check_is_weights(file)
    check_builder("network", options.network, options.option)
    preprocess = read_preprocess(options.preprocess)
    from sopdeploy_export.admit.network import memory_of_export, prepared
    from sopdeploy_export.user_network.admission import admit
    from sopdeploy_export.user_network.builder import network_builder
    from sopdeploy_export.user_network.loading import load_weights, read_weights

    # The network of the user, and what an export would refuse before its proof.
    weights = read_weights(file)  # before this code can change it
    build = network_builder("network", options.network, options.option)
    network = build()
    loaded = load_weights(network, weights, options.weights_key, ignore=options.ignore)
    with prepared(network, logits_key=options.logits_key) as prepared_network:
        admitted = admit(prepared_network, preprocess, several_classes=options.several_classes)
        if not options.allow_constants:
            traced = admitted.trained.trace
            _check_constants(traced, build, prepared_network, admitted.preprocess)

    # The export needs a file of names if the weights have none of these classes. Two names fit one
    # logit.
    takes_two = admitted.num_classes == 1 and not options.several_classes
    labels = _fitting_labels(loaded.labels, 2 if takes_two else admitted.num_classes)
    export_options = {
        **vars(options),
        "training_only": admitted.removable,
        "labels": CLASS_NAMES_FILE if labels is None else None,
    }
    if admitted.num_classes == 1 and labels is None:
        export_options["several_classes"] = True

    return Inspection(
        network=options.network,
        num_classes=admitted.num_classes,
        num_tensors=len(network.state_dict()),
        memory_bytes=memory_of_export(admitted.num_bytes),
        table=loaded.table,
        unused=admitted.removable,
        shared=admitted.shared_rests,
        command=_export_command(file, export_options),
        ignored=loaded.ignored,
        labels=labels,
        warnings=(*loaded.conversions, *admitted.warnings),
    )


def _fitting_labels(labels: tuple[str, ...] | None, num_names: int) -> tuple[str, ...] | None:
    """Return *labels* if they are *num_names* usable names of classes, else None."""
    if labels is None or len(labels) != num_names or label_problem(labels):
        return None
    return labels


def _check_constants(
    traced: "Trace",
    build: "Callable[[], nn.Module]",
    trained: "nn.Module",
    preprocess: Preprocess,
) -> None:
    """Refuse large tensors of *traced* that the network *trained* does not register, as an export does.

    Those that *build* makes again are accepted (`check_constants`).
    """
    from sopdeploy.bundle.manifest import BatchRange
    from sopdeploy_export.admit.outputs import check_trained_are_registered
    from sopdeploy_export.capture.program import trace
    from sopdeploy_export.prove.constants import check_constants
    from sopdeploy_export.user_network.export_network import checked_builder

    check_trained_are_registered(traced)
    rebuild = checked_builder(build, trained)

    def capture_rebuilt() -> "ExportedProgram":
        return trace(rebuild(), preprocess, BatchRange()).program

    check_constants(traced.program, capture_rebuilt)


def _export_command(weights: Path, options: Mapping[str, Any]) -> str:
    """Write the command that exports *weights* with *options*; those that are None or False are left out."""
    words = ["sopdeploy export", quote(str(weights))]
    for name, value in options.items():
        values = value if isinstance(value, tuple) else (value,)
        words += [
            command_line_option(name, each, NetworkExportOptions.KEYS)
            for each in values
            if each not in (None, False)
        ]
    return " ".join(words)
