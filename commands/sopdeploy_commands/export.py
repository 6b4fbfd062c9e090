"""`sopdeploy export`, `inspect`, `engine` and `triton`: from a network to a bundle, and from that onwards."""

import importlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import pydantic

from sopdeploy.base.config import StrictModel, first_problem, parse_json
from sopdeploy.base.environment import SLOW_INT8, garbage_kept, import_optional, lacks_vnni
from sopdeploy.base.files import MAX_TEXT_BYTES, read_file
from sopdeploy.base.names import label_problem
from sopdeploy.base.project import RUNS, file_project
from sopdeploy.cli.command import command, expand_options
from sopdeploy.cli.console import print_check, print_field
from sopdeploy.data.photos.any_images import ANY_IMAGES
from sopdeploy.data.photos.files import check_takes_output, data_folder
from sopdeploy.errors import (
    CheckpointError,
    ConfigError,
    EngineError,
    RuntimeUnavailableError,
    command_line_option,
    shorten,
)
from sopdeploy.images.preprocess import CONVENTIONS, Preprocess
from sopdeploy.paths import (
    check_is_checkpoint,
    check_is_weights,
    describe_wrong,
    is_output,
    needs_network,
    what_is,
)
from sopdeploy.weights.class_names import read_class_names
from sopdeploy_export.options import (
    EngineOptions,
    ExportOptions,
    NetworkExportOptions,
    NetworkOptions,
)
from sopdeploy_export.user_network.import_path import check_builder

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from sopdeploy_commands.engine.engine import EngineFile
    from sopdeploy_export.capture.program import Trace
    from sopdeploy_export.pack.results import Exported

CLASS_NAMES_FILE = "labels.txt"
SHOWN_MEMORY = 4_000_000_000  # bytes of memory from which `inspect` names what an export needs
EXAMPLE = (
    f"{', '.join(CONVENTIONS)}, timm:resnet18, torchvision:ResNet18_Weights.IMAGENET1K_V1 or FILE.json; "
    "imagenet:384 for images of 384 x 384"
)


def show_export(exported: "Exported", *, verbose: bool = False) -> None:
    """Print what the network is, what was checked, and the warnings.

    Args:
        verbose: Print all facts, one line each, before the checks.
    """
    print_field("network", exported.headline)
    if verbose:
        facts = exported.facts()
        width = max(map(len, facts))
        for name, text in facts.items():
            print_field(name, text, width=width)
    else:
        print_field("size", exported.size())

    for check in exported.checks():
        print_check(check.evidence, check.text, check.holds)
    if not verbose:
        for name, text in exported.notable_facts().items():
            print_field(name, text)
    print_field("bundle", f"{exported.path} ({exported.seconds:.0f} s)", style="bold green")

    # What a user must know before the bundle serves: int8 here, and an error that was allowed.
    warnings = list(exported.warnings)
    if exported.manifest.int8_for == "cpu" and lacks_vnni():
        warnings.insert(0, SLOW_INT8)
    if exported.parity.drift_allowed:
        warnings.insert(
            0,
            "the numerical error is above its limit; the bundle records that this was allowed",
        )
    for warning in warnings:
        print_field("warning", warning, style="bold yellow")

    print_field("page", str(exported.page), style="dim")
    print_field("next", f"sopdeploy serve {quote(str(exported.path))}", style="dim")


@command(
    show_export,
    summarize=lambda exported: exported.summary(),
    options={"out"},
    examples=(
        "sopdeploy export runs/latest/best.pt --detach",
        "sopdeploy export w.pth --network my_code:build --labels names.txt --preprocess timm:resnet50",
    ),
)
@garbage_kept()
@expand_options
def export(
    checkpoint: str | Path,
    out: str | Path = "bundles",
    *,
    options: ExportOptions,
    source: NetworkExportOptions,
    on_step: Callable[[str], None] = lambda _: None,
) -> "Exported":
    """Convert a checkpoint to a bundle: detach, prove equivalence, export to ONNX, compare, write.

    With --network, the file holds the weights of your own network, which your code builds. From
    Python, `sopdeploy.export_network` exports a network object.

    Args:
        checkpoint: A checkpoint of `sopdeploy train`, or with a network any weight file.
        out: Folder for the bundle.
        on_step: Called with a description of each step as it begins.

    Returns:
        The path of the bundle and the results of all checks.

    Raises:
        ConfigError: Options that are invalid or do not fit together.
        SopdeployError: A step failed; *out* contains nothing new.

    Examples:
        >>> exported = sopdeploy.export("runs/latest/best.pt", detach=True)
        >>> exported.path.parent.name
        'bundles'
        >>> exported.certificate.proof
        'three-way'
    """
    path = Path(checkpoint)
    out = Path(out)

    # A wrong file, folder or destination is an error here, before imports that take seconds and a
    # proof that takes minutes.
    if source.network is None:
        try:
            check_is_checkpoint(path)
        except CheckpointError as error:
            # A graph, or a network of another framework, has no use for the code of its network.
            if not needs_network(path):
                raise
            raise CheckpointError(
                error.message, remedies={"network": "module:callable"}
            ) from error

    for folder in filter(None, (options.calibrate, options.evaluate)):
        data_folder(folder, ANY_IMAGES)
    if out.is_file():
        raise ConfigError(f"{out} is a file; choose a folder", setting="out")
    check_takes_output(out, "out")

    # A network of the user, or one of the catalog.
    if source.network is not None:
        return _export_weights(path, out, source, options, on_step)
    from sopdeploy_commands.runs_page import write_runs_page
    from sopdeploy_export.pipeline import export_checkpoint

    exported = export_checkpoint(path, out, options=options, on_step=on_step)
    if RUNS.is_dir():
        write_runs_page()
    return exported


def _export_weights(
    weights: Path,
    out: Path,
    source: NetworkExportOptions,
    options: ExportOptions,
    on_step: Callable[[str], None],
) -> "Exported":
    """Export the network that *source* names with the weights of the file *weights*."""
    # What the user says about the network: classes, preprocessing, name. Mistakes are found before
    # torch is imported, which the preprocessing of timm does.
    labels = None if source.labels is None else read_class_names(source.labels)
    check_is_weights(weights)
    check_builder("network", str(source.network), source.option)
    if source.plain is not None:
        check_builder("plain", source.plain, source.plain_option)
    preprocess = read_preprocess(source.preprocess)
    name = options.name or file_project(weights)

    from sopdeploy_export.user_network.builder import network_builder
    from sopdeploy_export.user_network.export_network import export_network
    from sopdeploy_export.user_network.loading import load_weights, read_weights

    # The class names of the option, or else those in the file.
    file = read_weights(weights)  # before the user's code can change it
    labels = labels or file.labels
    if labels is None:
        message = (
            "missing; give a file with one class name per line, in the order of the logits"
        )
        raise ConfigError(message, setting="labels")

    # The user's code builds the networks: the one that was trained and, if given, the plain
    # one.
    plain = None
    if source.plain is not None:
        plain = network_builder("plain", source.plain, source.plain_option)
    build = network_builder("network", str(source.network), source.option)

    on_step("building the network")
    network = build()
    loaded = load_weights(
        network,
        file,
        source.weights_key,
        ignore=source.ignore,
        training_only=source.training_only,
    )
    del file  # frees as much memory as the network takes

    return export_network(
        network,
        plain=plain,
        rebuild=build if plain is None else plain,
        training_only=source.training_only,
        labels=labels,
        preprocess=preprocess,
        destination=out,
        name=name,
        logits_key=source.logits_key,
        allow_constants=source.allow_constants,
        several_classes=source.several_classes,
        options=options,
        config=_describe_source(source, loaded.table),
        sha256=loaded.sha256,
        warnings=loaded.warnings,
        on_step=on_step,
    )


def _describe_source(source: NetworkExportOptions, table: str) -> dict[str, object]:
    """Describe how to build the network of *source* again, with the weights of *table* in its file."""
    return {
        "network": source.network,
        "settings": list(source.option),
        "plain": source.plain,
        "plain_settings": list(source.plain_option),
        "training_only": list(source.training_only),
        "logits": source.logits_key,
        "allow_constants": source.allow_constants,
        "table": table,
        "ignore": list(source.ignore),
    }


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
        names = f"the {inspected.num_classes} class names, one per line,"
        if inspected.num_classes == 1:  # two names without an option, or a single one with it
            names = "the name of the class that the logit stands for"
        print_field("next", f"write {names} to {CLASS_NAMES_FILE}, then", style="dim")
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


def read_preprocess(text: str | None) -> Preprocess:
    """Read the preprocessing rules that *text* names.

    It is a convention such as `imagenet`, or `imagenet:SIDE`, `timm:NAME`,
    `torchvision:WEIGHTS`, or a file. After `fast:` or `scaled:`, the decoding of these rules becomes
    "fast" or "scaled".

    Raises `ConfigError` for an unknown name and for a file that is not a `Preprocess`.
    """
    if not text:
        raise ConfigError(f"missing; give {EXAMPLE}", setting="preprocess")
    prefix, _, name = text.partition(":")
    if prefix in ("fast", "scaled"):
        return read_preprocess(name).model_copy(update={"decoding": prefix})

    values: Any = None  # of a file, for the message of an error
    try:
        if prefix in CONVENTIONS and (name.isdecimal() or text == prefix):
            return Preprocess.of_convention(prefix, int(name or 224))
        # These prefixes name rules that a package publishes; any other text is the name of a file.
        if prefix == "timm":
            from sopdeploy.models.timm_networks import import_timm

            config = import_timm(name).get_pretrained_cfg(name)
            if config is None:
                raise ValueError("timm publishes no preprocessing for it")
            return Preprocess.from_timm(config.to_dict())

        if prefix == "torchvision":
            weights = importlib.import_module("torchvision.models").get_weight(name)
            return Preprocess.from_torchvision(weights.transforms())
        values = parse_json(read_file(text, MAX_TEXT_BYTES))
        return Preprocess.model_validate(values)
    except (AttributeError, KeyError, OSError, ValueError) as error:
        reason = str(error.strerror) if isinstance(error, OSError) else str(error)
        if isinstance(error, pydantic.ValidationError):
            reason = first_problem(error, values)
        elif prefix == "torchvision":
            reason = f"torchvision has no weights {name}"
        message = f"cannot be read ({reason}); give {EXAMPLE}"
        raise ConfigError(message, setting="preprocess", value=text) from error


def _show_engine(engine: "EngineFile") -> None:
    record = engine.record
    key = engine.record.key
    print_field("engine", f"{key.gpu} ({key.architecture}), TensorRT {key.tensorrt}")
    print_field("built", engine.reason or "no, it was in the cache")
    print_field("profiles", f"batches {', '.join(map(str, key.profiles))}")
    print_field("precision", key.precision)

    for replay in record.replays:
        for text in replay.lines():
            print_field("outputs", text)
    if record.accepted_errors:
        changed = max(replay.num_changed for replay in record.replays)
        print_field(
            "accepted",
            f"a numerical error beyond the tolerance, which changes the class of {changed} reference images",
            style="bold yellow",
        )
    print_field("ready", f"{engine.path} ({record.plan_bytes:,} bytes)", style="bold green")


@command(
    _show_engine,
    summarize=lambda engine: {
        "plan": str(engine.path),
        "built": engine.reason is not None,
        "reason": engine.reason,
        "record": engine.record.model_dump(mode="json"),
    },
    examples=("sopdeploy engine bundles/photos-3f6c01d2a4b7 --profiles 1,8,32",),
)
@expand_options
def engine(
    bundle: Path, *, options: EngineOptions, on_step: Callable[[str], None] = lambda _: None
) -> "EngineFile":
    """Build the TensorRT engine of a bundle for this GPU, or find it in the cache, and check its outputs.

    Args:
        bundle: A bundle written by `sopdeploy export`.
    """
    import_optional("onnx", "onnx", "sopdeploy[tensorrt]", RuntimeUnavailableError)
    from sopdeploy.bundle.folder import open_bundle
    from sopdeploy_commands.engine.engine import get_engine

    opened_bundle = open_bundle(bundle)
    cache_of_servers = os.environ.get("SOPDEPLOY_ENGINE_CACHE")
    if options.cache is None and cache_of_servers:
        options = options.model_copy(update={"cache": Path(cache_of_servers)})

    # The converter of torch-tensorrt starts from the checkpoint, which not every bundle has.
    if options.via == "torch-tensorrt" and "network" in opened_bundle.manifest.config:
        message = f"{bundle}: holds a network of your own, which has no checkpoint to convert; omit via"
        raise EngineError(message)
    if options.via == "torch-tensorrt" and options.checkpoint is None:
        problem = "converts the program of the checkpoint that was exported"
        raise ConfigError(problem, setting="via", remedies={"checkpoint": None})

    if options.checkpoint is None:
        return get_engine(opened_bundle, options, on_step)

    # `EngineOptions` has a checkpoint with torch-tensorrt only.
    check_is_checkpoint(options.checkpoint)
    from sopdeploy_commands.engine.from_program import build_from_program
    from sopdeploy_export.pipeline import rebuild_program

    read_program = partial(rebuild_program, options.checkpoint, opened_bundle.manifest)
    return get_engine(
        opened_bundle,
        options,
        on_step,
        partial(build_from_program, opened_bundle, read_program),
    )


@command(examples=("sopdeploy triton bundles/photos-3f6c01d2a4b7 models",))
def triton(bundle: Path, repository: Path) -> None:
    """Write a bundle into a Triton model repository: config, labels, warm-up and graph.

    Args:
        bundle: A bundle written by `sopdeploy export`.
        repository: Triton model repository; created if it is missing.
    """
    from sopdeploy.bundle.folder import open_bundle
    from sopdeploy_export.triton import write_triton

    check_takes_output(repository, None)
    if is_output(repository):
        raise ConfigError(f"{repository}: holds runs or bundles; choose another folder")
    opened_bundle = open_bundle(bundle)
    written = write_triton(opened_bundle, repository)
    print_field(
        "model", f"{written.name}, batches of 1 to {opened_bundle.manifest.batch.maximum}"
    )
    print_field("written", str(written), style="bold green")
