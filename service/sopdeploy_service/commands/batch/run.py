"""`sopdeploy classify`: classify all images of some sources into parquet files; continue after a stop."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.config import StrictModel
from sopdeploy.data.folder_store import OpenOptions
from sopdeploy.environment import import_optional
from sopdeploy.errors import ConfigError
from sopdeploy_service.commands.batch.classifier import PartClassifier, PartOutputs
from sopdeploy_service.commands.batch.decoders import DecoderProcesses
from sopdeploy_service.commands.batch.listing import Fingerprint, Listing, entries_of
from sopdeploy_service.commands.batch.on_ray import RayBackend, ray_backend
from sopdeploy_service.commands.batch.options import ClassifyOptions, RayOptions
from sopdeploy_service.commands.batch.output import PAGE, ROWS, OnProgress, OutputFolder, Progress, RunState
from sopdeploy_service.commands.batch.rows import RowFormat
from sopdeploy_service.commands.batch.sources import list_entries
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import Settings

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


def classify(
    bundle: Path,
    sources: Sequence[str],
    out: Path,
    settings: Settings,
    options: ClassifyOptions | None = None,
    on_progress: OnProgress = lambda _done, _errors, _total: None,
    ray: RayOptions | None = None,
) -> Classified:
    """Classify the images of *sources* with *bundle* and write one row per image below *out*.

    Continues a run that was stopped: parts that are complete are kept. An image that cannot be decoded gets a
    row with its error. Calls *on_progress* with the numbers of images done, with an error, and in total. With
    *ray*, actors of a cluster classify the images. Raises `DataError` for unusable sources and too many
    errors, `ConfigError` for a folder of another run, and the errors of `load_model`.
    """
    options, folder = options or ClassifyOptions(), OutputFolder(out)
    report = import_optional(REPORT, "jinja2", "sopdeploy[batch]", ConfigError, "classify")
    opened = open_bundle(bundle)
    chosen: AbstractContextManager[LocalBackend | RayBackend] = local_backend(bundle, settings, options)
    if ray is not None:
        chosen = ray_backend(bundle, settings, options, ray)
    with chosen as backend, folder.locked():
        listing, images = _begin(folder, sources, backend.state())
        progress = Progress(images, options.max_errors, on_progress)
        pending = _unfinished(folder, listing, progress)
        if pending:
            backend.write_parts(folder, listing, pending, progress)
        written = report.write_report(folder, listing, opened, settings)
        return Classified(
            out=out,
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
    entries = list_entries(sources, OpenOptions())
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


class LocalBackend:
    """Classifies in this process; another thread writes a part while the next one is classified.

    `RayBackend` has the same methods.
    """

    def __init__(self, classifier: PartClassifier, decoders: DecoderProcesses, row_format: RowFormat) -> None:
        self._classifier, self._decoders, self._row_format = classifier, decoders, row_format

    def state(self) -> RunState:
        """Describe what the rows depend on, without their images."""
        return self._classifier.state()

    def write_parts(
        self, folder: OutputFolder, listing: Listing, pending: Sequence[int], progress: Progress
    ) -> None:
        """Classify the parts *pending* of *listing*, write them to *folder*, and count their images."""
        parts = ((number, entries_of(listing.read_table(number))) for number in pending)
        written: Future[None] | None = None

        def write(part: PartOutputs) -> None:
            folder.write_part(part.number, self._row_format.table(part))

        with ThreadPoolExecutor(1, thread_name_prefix="writer") as writer:
            for part in self._classifier.run(parts, self._decoders, progress.add):
                if written is not None:
                    written.result()
                written = writer.submit(write, part)
            if written is not None:
                written.result()


@contextmanager
def local_backend(bundle: Path, settings: Settings, options: ClassifyOptions) -> Iterator[LocalBackend]:
    """Load *bundle* in this process, and release it at the end; decoders start while images are listed."""
    loaded = load_model(bundle, settings)
    try:
        classifier = PartClassifier(loaded, settings, options)
        with classifier.decoders() as decoders:
            yield LocalBackend(classifier, decoders, RowFormat(loaded.bundle, classifier.top_k, options))
    finally:
        loaded.runtime.close()
