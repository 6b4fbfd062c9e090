"""`sopdeploy classify`: classify all images of some sources into parquet files; continue after a stop."""

import csv
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import pydantic

from sopdeploy.base.config import StrictModel
from sopdeploy.base.environment import import_optional
from sopdeploy.base.files import atomic_write, new_folder, writing
from sopdeploy.cli.command import SettingOptions, command, expand_options
from sopdeploy.cli.console import print_field
from sopdeploy.errors import ConfigError, ImageError, MissingPackageError
from sopdeploy_commands.classify.options import ClassifyOptions
from sopdeploy_service.settings import Settings, load_settings, parse_assignments

if TYPE_CHECKING:
    from sopdeploy_commands.classify.classifier import BatchClassifier
    from sopdeploy_commands.classify.on_ray import RayClassifier
    from sopdeploy_commands.predict import FilePrediction


# The columns of a CSV file; a cell is empty where an image has no value.
CsvRow = TypedDict(
    "CsvRow", {"image": str, "class": str, "probability": str, "known": str, "error": str}
)


class Classified(StrictModel):
    """A finished run.

    Attributes:
        rows: The folder of the parquet files, or the CSV file.
        num_images: Number of images and of rows.
        num_errors: Number of images that have an error and no prediction.
        skipped: Number of files of the sources that are not images, by suffix.
    """

    rows: Path
    num_images: int
    num_errors: int
    skipped: dict[str, int] = pydantic.Field(default_factory=dict)


def _show(classified: Classified) -> None:
    print_field("images", f"{classified.num_images:,}; {classified.num_errors:,} with an error")
    if classified.skipped:
        from sopdeploy.images.signatures import describe_skipped

        print_field("skipped", describe_skipped(classified.skipped))
    print_field("rows", str(classified.rows), style="bold green")


@command(
    _show,
    options={"out"},
    settings=SettingOptions(parse_assignments),
    examples=(
        "sopdeploy classify bundles/photos-3f6c01d2a4b7 photos --out results",
        "sopdeploy classify bundles/photos-3f6c01d2a4b7 photos --out results.csv",
        "sopdeploy classify bundles/photos-3f6c01d2a4b7 s3://bucket/photos --out results",
    ),
)
@expand_options
def classify(
    bundle: str | Path,
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    options: ClassifyOptions,
    config: str | Path | None = None,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
    **settings: Any,
) -> Classified:
    """Classify any number of images into parquet files, or into one CSV file, one row per image.

    Repeat the command to continue an interrupted run into a folder. A CSV file is written
    again from the beginning. An image that cannot be used gets a row with its error. The results
    equal the results of the service. With a folder, the memory depends on `workers` and
    `part_images`, not on the number of images.

    Args:
        bundle: A bundle written by `sopdeploy export`.
        sources: Folders, .tar archives, lists of paths (.txt), images; paths or URLs that fsspec opens.
        out: Folder for parquet files, where an interrupted run continues, or a file that ends in .csv.
        config: TOML file with settings.
        on_image: Called with the numbers of images done and in total.
        **settings: Settings of the server that apply to decoding and inference, for example `threads=1`,
            `max_batch=8` or `top_k=1`.

    Returns:
        The folder of the rows, and the numbers of images and errors.

    Raises:
        DataError: A source is missing, damaged or has no images.
        ConfigError: Invalid options, or *out* belongs to another run.
        BundleError: The bundle is damaged.
        StorageError: *out* cannot be written.
        MissingPackageError: A package of an extra is missing.
        RuntimeUnavailableError: No runtime can run the bundle, or its device failed.

    Examples:
        >>> bundle = "bundles/photos-3f6c01d2a4b7"
        >>> classified = sopdeploy.classify(bundle, "photos", "results")
        >>> classified.num_images, classified.num_errors
        (60, 0)
    """
    names = [str(name) for name in ([sources] if isinstance(sources, str | Path) else sources)]

    loaded_settings = load_settings(None if config is None else Path(config), **settings)
    if Path(out).suffix.lower() == ".csv":
        return _classify_to_csv(
            Path(bundle), names, Path(out), options, loaded_settings, on_image
        )
    from sopdeploy_commands.classify.output import OutputFolder
    from sopdeploy_commands.classify.sources import list_sources
    from sopdeploy_commands.tables import ROWS_FOLDER

    # The rows must not be written into the folder that is listed.
    if any(
        "://" not in name and os.path.realpath(name) == os.path.realpath(out) for name in names
    ):
        raise ConfigError("is a source; choose another folder", setting="out", value=out)
    folder = OutputFolder(Path(out))
    done = 0
    skipped = Counter[str]()

    with (
        closing(_open_classifier(Path(bundle), loaded_settings, options)) as classifier,
        folder.locked(),
    ):
        # A repeated command must list the same images; it continues with the missing parts.
        folder.begin(list_sources(names, skipped), options.part_images, classifier.state)
        sizes = folder.sizes()
        total = sum(sizes)

        def add_done(num_images: int) -> None:
            nonlocal done
            done += num_images
            on_image(done, total)

        # Parts that earlier runs have written stay as they are.
        pending = [part for part, size in enumerate(sizes) if not folder.is_written(part, size)]
        # The images that earlier runs have classified count as done.
        add_done(total - sum(sizes[part] for part in pending))
        try:
            if pending:
                classifier.classify_parts(folder, pending, add_done)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; run the same command again to continue") from None

        error_counts = [folder.num_errors(part, size) for part, size in enumerate(sizes)]

    # All parts are written, so no count is None.
    num_errors = sum(count for count in error_counts if count is not None)
    rows = folder.path / ROWS_FOLDER
    return Classified(rows=rows, num_images=done, num_errors=num_errors, skipped=dict(skipped))


def _classify_to_csv(
    bundle: Path,
    sources: Sequence[str],
    out: Path,
    options: ClassifyOptions,
    settings: Settings,
    on_image: Callable[[int, int], None],
) -> Classified:
    """Classify the images of *sources* into the CSV file *out* as `predict` does, without any extra."""
    from sopdeploy_commands.classify.sources import list_sources, read_listed
    from sopdeploy_commands.predict import FilePrediction, Network, predict_one
    from sopdeploy_service.http.problems import describe_error
    from sopdeploy_service.inference.loader import load_model
    from sopdeploy_service.inference.results import HttpError

    # Options of parquet files have no effect on a CSV file.
    for name in options.model_fields_set:
        if getattr(options, name) != ClassifyOptions.model_fields[name].default:
            raise ConfigError(
                "works only with a folder of parquet files; give one as out", setting=name
            )
    skipped = Counter[str]()
    images = list(list_sources(sources, skipped))
    num_errors = 0
    loaded = load_model(bundle, settings)
    network = Network.of_bundle(loaded)
    is_multi_label = network.rules.is_multi_label

    # Rows are written one by one; the file gets its name when all are there.
    with (
        writing(out),
        new_folder(out.parent),
        atomic_write(out, durable=True) as partial,
        partial.open("w", encoding="utf-8-sig", newline="") as file,  # for spreadsheets
    ):
        rows = csv.DictWriter(file, CsvRow.__annotations__)
        rows.writeheader()

        # An image with an error gets its row, too; the others are classified.
        for done, image in enumerate(images, 1):
            try:
                content = read_listed(image, settings.max_body_bytes + 1)  # enough to refuse it
                prediction = predict_one(network, content, image.path, settings, explain=False)
            except ImageError as error:
                failure = describe_error(HttpError.from_image_error(error))
                prediction = FilePrediction(image=image.path, error=failure)
            if prediction.error is not None:
                num_errors += 1
            rows.writerow(_csv_row(prediction, is_multi_label=is_multi_label))
            on_image(done, len(images))

    return Classified(
        rows=out, num_images=len(images), num_errors=num_errors, skipped=dict(skipped)
    )


def _csv_row(prediction: "FilePrediction", *, is_multi_label: bool) -> CsvRow:
    """Format the row of one image, with its classes and the largest probability."""
    ranked = prediction.classes if is_multi_label else prediction.classes[:1]
    labels = "; ".join(each.label for each in ranked)
    probability = f"{ranked[0].probability:.4f}" if ranked else ""
    known = "" if prediction.known is None else str(prediction.known).lower()
    problem = "" if prediction.error is None else prediction.error.detail
    return {
        "image": _no_formula(prediction.image),
        "class": _no_formula(labels),
        "probability": probability,
        "known": known,
        "error": problem,
    }


def _no_formula(text: str) -> str:
    """Put an apostrophe before a *text* that a spreadsheet would compute, such as the name `=1.jpg`."""
    return f"'{text}" if text.startswith(tuple("=+-@\t\r")) else text


def _open_classifier(
    bundle: Path, settings: Settings, options: ClassifyOptions
) -> "BatchClassifier | RayClassifier":
    """Load *bundle* in this process or, if *options* name a Ray cluster, on its machines."""
    from sopdeploy_commands.classify.classifier import BatchClassifier

    if options.ray is None:
        return BatchClassifier(bundle, settings, options)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if options.starts_cluster:
        # A cluster that no other machine can join has its ports on loopback only, also on
        # Linux.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

    module = "sopdeploy_commands.classify.on_ray"
    on_ray = import_optional(module, "Ray Data", ".[batch,ray]", MissingPackageError, "--ray")
    classifier: RayClassifier = on_ray.RayClassifier(bundle, settings, options)
    return classifier
