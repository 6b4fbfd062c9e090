"""`sopdeploy classify`: classify all images of some sources into parquet files; continue after a stop."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.config import StrictModel, expand_options
from sopdeploy.environment import import_optional
from sopdeploy.errors import ConfigError
from sopdeploy_service.commands.batch.classifier import PartClassifier
from sopdeploy_service.commands.batch.listing import Fingerprint, Listing
from sopdeploy_service.commands.batch.options import ClassifyOptions
from sopdeploy_service.commands.batch.output import PAGE, ROWS, OnProgress, OutputFolder, Progress, RunState
from sopdeploy_service.commands.batch.sources import list_entries
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import load_settings

SHOWN_CLASSES = 20  # in a notebook
REPORT = "sopdeploy_service.commands.batch.report"  # needs jinja2


class Classified(StrictModel):
    """A finished run; a notebook shows its figures and a link to the report.

    Attributes:
        out: The output folder.
        bundle: Name of the bundle.
        images: Number of images and of rows.
        errors: Number of images that have an error and no prediction.
        parts: Number of parquet files.
        classified: Number of images that this call classified, without those of an earlier, stopped run.
        drift: Whether the report shows a drift alarm; None if the bundle has no held-out predictions.
        counts: Number of images of each class, as in the report.
    """

    out: Path
    bundle: str
    images: int
    errors: int
    parts: int
    classified: int
    drift: bool | None
    counts: dict[str, int]

    @property
    def rows(self) -> Path:
        """The folder of the parquet files."""
        return self.out / ROWS

    @property
    def report(self) -> Path:
        """The report page."""
        return self.out / PAGE

    @property
    def drift_text(self) -> str:
        """The result of the comparison with the held-out images."""
        return "the predictions differ from the held-out ones" if self.drift else "not detectable"

    def _repr_html_(self) -> str:
        largest = sorted(self.counts.items(), key=lambda item: -item[1])[:SHOWN_CLASSES]
        facts = [
            ("images", f"{self.images:,}; {self.errors:,} with an error"),
            ("classes", ", ".join(f"{label} {count:,}" for label, count in largest if count) or "none"),
            *([] if self.drift is None else [("drift", self.drift_text)]),
            ("rows", f"{self.rows}: {self.parts} parquet files"),
        ]
        templates = import_optional("sopdeploy.html.templates", "jinja2", "sopdeploy[batch]", ConfigError)
        page: str = templates.render(
            "sopdeploy_service.commands.batch", "notebook_batch.html", run=self, facts=facts
        )
        return page


@expand_options
def classify(
    bundle: str | Path,
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    options: ClassifyOptions,
    config: str | Path | None = None,
    on_progress: OnProgress = lambda _done, _errors, _total: None,
    **settings: Any,
) -> Classified:
    """Classify any number of images into parquet files, one row per image; continue a run that was stopped.

    The memory depends on `workers` and `part_images`, not on the number of images.

    Args:
        bundle: A bundle written by `sopdeploy.export`.
        sources: One or several of: folders, patterns, images, tar archives, lists of paths (`.txt`), URLs.
        out: Folder for the rows and the report; an interrupted run in it continues.
        options: The fields of `ClassifyOptions`, each as a keyword argument.
        config: TOML file with settings, as for `serve`.
        on_progress: Called with the numbers of images done, with an error, and in total.
        **settings: Settings of the server that apply to decoding and inference, for example `threads=1`,
            `max_batch=8` or `top_k=1`.

    Returns:
        The folder, the numbers of images, errors and images per class, and whether the predictions drift; a
        notebook shows them with a link to the report.

    Raises:
        DataError: A source is missing, damaged or has no images.
        ConfigError: Invalid options, or *out* belongs to another run.
        BundleError: The bundle is damaged.
        StorageError: *out* cannot be written.
        RuntimeUnavailableError: No runtime can run the bundle, or its device failed.
    """
    names = [str(name) for name in ([sources] if isinstance(sources, str | Path) else sources)]
    loaded = load_settings(None if config is None else Path(config), **settings)
    bundle, folder = Path(bundle), OutputFolder(Path(out))
    report = import_optional(REPORT, "jinja2", "sopdeploy[batch]", ConfigError, "classify")
    opened = open_bundle(bundle)
    with PartClassifier(load_model(bundle, loaded), loaded, options) as classifier, folder.locked():
        listing, images = _begin(folder, names, classifier.state)
        progress = Progress(images, on_progress)
        pending = _unfinished(folder, listing, progress)
        if pending:
            parts = ((number, listing.read(number)) for number in pending)
            for number, table in classifier.tables(parts, progress.add):
                folder.write_part(number, table)
        written = report.write_report(folder, listing, opened, loaded)
        return Classified(
            out=folder.path,
            bundle=opened.name,
            images=images,
            errors=progress.errors,
            parts=listing.parts(),
            classified=sum(map(listing.images_of, pending)),
            drift=None if written.drift is None else any(test.alarm for test in written.drift.values()),
            counts=written.counts,
        )


def _begin(folder: OutputFolder, sources: Sequence[str], state: RunState) -> tuple[Listing, int]:
    """List the images of *sources*; write the state of a new run, or compare it with the run to continue."""
    listing = Listing(folder.path)
    entries = list_entries(sources)
    is_new = folder.read_state() is None
    source = listing.write(entries, state.part_images) if is_new else Fingerprint(entries)
    folder.begin(state.model_copy(update={"source": source.sha256, "images": source.images}))
    return listing, source.images


def _unfinished(folder: OutputFolder, listing: Listing, progress: Progress) -> list[int]:
    """Return the parts that are not complete, and add the images of complete parts to *progress*."""
    pending = []
    for part in range(listing.parts()):
        images = listing.images_of(part)
        errors = folder.errors_in(part, images)
        if errors is None:
            pending.append(part)
        else:
            progress.add(images, errors)
    return pending
