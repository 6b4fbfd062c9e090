"""`sopdeploy export`: from a checkpoint, or the weights of a network of your own, to a bundle."""

from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from sopdeploy.base.environment import SLOW_INT8, garbage_kept, lacks_vnni
from sopdeploy.base.project import RUNS, file_project
from sopdeploy.cli.command import command, expand_options
from sopdeploy.cli.console import print_check, print_field
from sopdeploy.data.photos.files import ANY_IMAGES, data_folder
from sopdeploy.data.photos.outputs import check_takes_output
from sopdeploy.errors import CheckpointError, ConfigError
from sopdeploy.paths import needs_network
from sopdeploy.weights.class_names import check_order, read_class_names
from sopdeploy.weights.files import check_is_checkpoint, check_is_weights
from sopdeploy_commands.rules import read_preprocess
from sopdeploy_export.options import ExportOptions, NetworkExportOptions
from sopdeploy_export.user_network.import_path import check_builder

if TYPE_CHECKING:
    from sopdeploy_export.pack.results import Exported


TRANSFORMERS = "transformers"  # as a network: a folder of Hugging Face Transformers


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
    from sopdeploy_export.export_checkpoint import export_checkpoint

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
    if source.network == TRANSFORMERS:
        return _export_folder(weights, out, labels, source, options, on_step)
    check_is_weights(weights)
    check_builder("network", str(source.network), source.option)
    if source.plain is not None:
        check_builder("plain", source.plain, source.plain_option)
    preprocess = None if source.preprocess is None else read_preprocess(source.preprocess)
    if source.transform is not None:
        check_builder("transform", source.transform, ())
    name = options.name or file_project(weights)

    from sopdeploy.models.base import Classifier
    from sopdeploy_export.user_network.builder import import_transform, network_builder
    from sopdeploy_export.user_network.export_network import export_network
    from sopdeploy_export.user_network.loading import load_weights, read_weights

    # The class names of the option, or else those in the file.
    file = read_weights(weights)  # before the user's code can change it
    order_warnings = () if labels is None else check_order(labels, file.labels, weights)
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
    transform = None
    if source.transform is not None:
        transform = import_transform(source.transform, source.transform_takes)

    on_step("building the network")
    network = build()
    if isinstance(network, Classifier) and options.detach:
        # A network of the catalog knows what is for training only, and what remains.
        trained_only = source.training_only or network.training_only
        source = source.model_copy(update={"training_only": trained_only})
        plain = plain or network.inference_model
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
        transform=transform,
        destination=out,
        name=name,
        logits_key=source.logits_key,
        allow_constants=source.allow_constants,
        several_classes=source.several_classes,
        allow_other_pixels=source.allow_other_pixels,
        options=options,
        config=_describe_source(source, loaded.table),
        sha256=loaded.sha256,
        warnings=(*loaded.warnings, *order_warnings),
        on_step=on_step,
    )


def _export_folder(
    folder: Path,
    out: Path,
    labels: tuple[str, ...] | None,
    source: NetworkExportOptions,
    options: ExportOptions,
    on_step: Callable[[str], None],
) -> "Exported":
    """Export the image classifier that Transformers saved in *folder*, with the class names *labels* if given."""
    for name in ("option", "plain", "plain_option", "weights_key", "ignore", "logits_key"):
        if getattr(source, name):
            raise ConfigError(
                f"does not apply to a folder of {TRANSFORMERS}; omit it", setting=name
            )
    preprocess = None if source.preprocess is None else read_preprocess(source.preprocess)
    from sopdeploy_export.user_network.builder import import_transform
    from sopdeploy_export.user_network.export_network import export_network
    from sopdeploy_export.user_network.transformers_folder import (
        LOGITS,
        check_is_folder,
        open_folder,
    )

    check_is_folder(folder)
    on_step("building the network")
    opened = open_folder(folder)
    transform = opened.transform
    if source.transform is not None:
        transform = import_transform(source.transform, source.transform_takes)
    order_warnings = () if labels is None else check_order(labels, opened.labels, folder)

    return export_network(
        opened.network,
        rebuild=opened.build,
        training_only=source.training_only,
        labels=labels or opened.labels,
        preprocess=preprocess,
        transform=transform,
        destination=out,
        name=options.name or file_project(folder),
        logits_key=LOGITS,
        allow_constants=source.allow_constants,
        several_classes=source.several_classes,
        allow_other_pixels=source.allow_other_pixels,
        options=options,
        config=_describe_source(source, ""),
        sha256=opened.sha256,
        warnings=order_warnings,
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
