"""`sopdeploy classify`: classify all images of some sources into parquet files; continue after a stop."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.config import StrictModel, expand_options
from sopdeploy.environment import import_optional, prepare_ray
from sopdeploy.errors import ConfigError
from sopdeploy.files import atomic_write
from sopdeploy_service.commands.batch.classifier import PartClassifier
from sopdeploy_service.commands.batch.listing import Listing, write_list
from sopdeploy_service.commands.batch.options import NEW_CLUSTER, ClassifyOptions
from sopdeploy_service.commands.batch.output import LISTING, PAGE, ROWS_FOLDER, OutputFolder
from sopdeploy_service.commands.batch.sources import list_entries
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import Settings, load_settings

if TYPE_CHECKING:
    from sopdeploy_service.commands.batch.on_ray import RayClassifier

ON_RAY = "sopdeploy_service.commands.batch.on_ray"
REPORT = "sopdeploy_service.commands.batch.report"  # needs jinja2


class Classified(StrictModel):
    """A finished run.

    Attributes:
        out: The output folder.
        bundle: Name of the bundle.
        num_images: Number of images and of rows.
        num_errors: Number of images that have an error and no prediction.
        num_parts: Number of parquet files.
        classified: Number of images that this call classified, without those of an earlier, stopped run.
        drift: Whether the report shows a drift alarm; None if the bundle has no held-out predictions.
        counts: Number of images of each class, as in the report.
    """

    out: Path
    bundle: str
    num_images: int
    num_errors: int
    num_parts: int
    classified: int
    drift: bool | None
    counts: dict[str, int]

    @property
    def rows(self) -> Path:
        """The folder of the parquet files."""
        return self.out / ROWS_FOLDER

    @property
    def report(self) -> Path:
        """The report page."""
        return self.out / PAGE

    @property
    def drift_text(self) -> str:
        """The result of the comparison with the held-out images."""
        return "the predictions differ from the held-out ones" if self.drift else "not detectable"


@expand_options
def classify(
    bundle: str | Path,
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    options: ClassifyOptions,
    config: str | Path | None = None,
    on_progress: Callable[[int, int, int], None] = lambda _done, _errors, _total: None,
    **settings: Any,
) -> Classified:
    """Classify any number of images into parquet files, one row per image; continue a run that was stopped.

    The memory depends on `workers` and `part_images`, not on the number of images.

    Args:
        bundle: A bundle written by `sopdeploy.export`.
        sources: One or several of: folders, patterns, images, tar archives, parquet files, lists of paths
            (`.txt`), URLs.
        out: Folder for the rows and the report; an interrupted run in it continues.
        options: The fields of `ClassifyOptions`, each as a keyword argument.
        config: TOML file with settings, as for `serve`.
        on_progress: Called with the numbers of images done, with an error, and in total.
        **settings: Settings of the server that apply to decoding and inference, for example `threads=1`,
            `max_batch=8` or `top_k=1`.

    Returns:
        The folder, the numbers of images, errors and images per class, and whether the predictions drift.

    Raises:
        DataError: A source is missing, damaged or has no images.
        ConfigError: Invalid options, or *out* belongs to another run.
        BundleError: The bundle is damaged.
        StorageError: *out* cannot be written.
        RuntimeUnavailableError: No runtime can run the bundle, or its device failed.
    """
    names = [str(name) for name in ([sources] if isinstance(sources, str | Path) else sources)]
    loaded_settings = load_settings(None if config is None else Path(config), **settings)
    folder = OutputFolder(Path(out))
    report = import_optional(REPORT, "jinja2", "sopdeploy[batch]", ConfigError, "classify")
    with _open_classifier(Path(bundle), loaded_settings, options) as classifier, folder.locked():
        with atomic_write(folder.path / LISTING) as partial:
            source, images = write_list(partial, list_entries(names), classifier.part_images)
            folder.begin(classifier.run_state(source, images))  # rejects a folder of another run
        listing = Listing(folder.path / LISTING)
        done = errors = 0

        def count(more_images: int, more_errors: int) -> None:
            nonlocal done, errors
            done, errors = done + more_images, errors + more_errors
            on_progress(done, errors, images)

        pending = []
        for part in range(listing.num_parts()):
            errors_in_part = folder.errors_in(part, listing.images_of(part))
            if errors_in_part is None:
                pending.append(part)
            else:
                count(listing.images_of(part), errors_in_part)
        classifier.write_parts(folder, listing, pending, count)
        opened = open_bundle(Path(bundle))
        written = report.write_batch_report(folder, listing, opened, loaded_settings)
        return Classified(
            out=folder.path,
            bundle=opened.name,
            num_images=images,
            num_errors=errors,
            num_parts=listing.num_parts(),
            classified=sum(map(listing.images_of, pending)),
            drift=None if written.drift is None else any(test.alarm for test in written.drift.values()),
            counts=written.counts,
        )


def _open_classifier(
    bundle: Path, settings: Settings, options: ClassifyOptions
) -> "PartClassifier | RayClassifier":
    """Load *bundle* in this process, or connect to the Ray cluster of *options*, whose machines load it."""
    if options.ray is None:
        return PartClassifier(load_model(bundle, settings), settings, options)
    if options.keep is not None:
        raise ConfigError("one process writes to the folder; keep without a Ray cluster", setting="keep")
    prepare_ray(starts=options.ray == NEW_CLUSTER)
    on_ray = import_optional(ON_RAY, "Ray Data", "sopdeploy[batch,ray]", ConfigError, "--ray")
    classifier: RayClassifier = on_ray.RayClassifier(bundle, settings, options)
    return classifier
