"""The report of a run, `_report.html` and `_report.json`: counts per class, errors, uncertain images, drift.

It reads the rows part by part, so it also covers the parts of interrupted runs and needs little memory.
"""

import base64
import heapq
import io
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from markupsafe import Markup

from sopdeploy.bundle.folder import Bundle
from sopdeploy.config import StrictModel
from sopdeploy.errors import ImageError
from sopdeploy.evaluation.drift import FALSE_ALARMS, SIGNIFICANCE, PredictionCounts
from sopdeploy.html.charts import Bar, svg_bars
from sopdeploy.html.templates import render_template
from sopdeploy.images.formats import open_image
from sopdeploy.images.pixels import to_rgb
from sopdeploy_service.commands.batch.listing import Listing
from sopdeploy_service.commands.batch.output import DATA, PAGE, OutputFolder
from sopdeploy_service.commands.batch.reader import ListedImage, Reader
from sopdeploy_service.images.decode import EncodedImage
from sopdeploy_service.images.loaders import make_decoder
from sopdeploy_service.settings import Settings

LEAST_CERTAIN = 24
THUMBNAIL_WIDTH = 96  # width in CSS pixels
STORED = 2 * THUMBNAIL_WIDTH  # longer side in pixels, for screens with two pixels per CSS pixel
MAX_BARS = 50  # classes in the chart; the others are in `DATA`
_MAX_EXAMPLES = 5  # paths per kind of error
_COLUMNS = ["path", "classes", "probabilities", "known", "error"]


class Uncertain(StrictModel):
    """An image with a low probability of its best class."""

    path: str
    label: str
    probability: float


class ErrorKind(StrictModel):
    """The number of images with the error *code*, and the paths of the first ones."""

    code: str
    num_images: int
    examples: tuple[str, ...]


class DriftTest(StrictModel):
    """One comparison with the held-out images; see `sopdeploy.evaluation.drift.Comparison`."""

    distance: float
    p_value: float
    alarm: bool


class BatchReport(StrictModel):
    """The content of `_report.json`.

    *counts* maps each class to the number of images with this most probable class or, for a multi-label
    network, with this class among others. *unknown* counts the images below the rejection threshold. *drift*
    maps what is compared to the result of the test. It is None if the bundle has no held-out predictions, as
    those of multi-label networks.
    """

    bundle: str
    num_images: int
    errors: tuple[ErrorKind, ...]
    unknown: int
    counts: dict[str, int]
    least_certain: tuple[Uncertain, ...]
    drift: dict[str, DriftTest] | None
    false_alarm_rate: float = FALSE_ALARMS


def write_batch_report(
    folder: OutputFolder, listing: Listing, bundle: Bundle, settings: Settings
) -> BatchReport:
    """Write the report of the finished run in *folder* with the images of *listing*."""
    report, positions = _summarize(folder, listing.num_parts(), bundle)
    thumbnails = [_thumbnail(listing.read(part)[row], bundle, settings) for part, row in positions]
    page = render_template(
        "sopdeploy_service.commands.batch",
        "batch.html",
        report=report,
        rejects=bundle.manifest.rejection is not None,
        multi_label=bundle.manifest.thresholds is not None,
        failed=sum(kind.num_images for kind in report.errors),
        classes=_class_bars(report),
        hidden=max(0, len(report.counts) - MAX_BARS),
        least=list(zip(thumbnails, report.least_certain, strict=True)),
        level=SIGNIFICANCE,
    )
    folder.write_text(DATA, report.model_dump_json(indent=2) + "\n")
    folder.write_text(PAGE, page)
    return report


def _summarize(
    folder: OutputFolder, num_parts: int, bundle: Bundle
) -> tuple[BatchReport, list[tuple[int, int]]]:
    """Read all rows; return the report, and part and row of the least certain images."""
    decision, multi_label = bundle.manifest.decision, bundle.manifest.thresholds is not None
    indices = {label: index for index, label in enumerate(bundle.labels)}
    predictions, counts = PredictionCounts(len(bundle.labels)), Counter[str]()
    errors, examples = Counter[str](), defaultdict[str, list[str]](list)
    images = unknown = 0
    least: list[tuple[float, int, int, str, str]] = []  # probability, part, row, path, class
    for part in range(num_parts):
        classes: list[int] = []
        confidences: list[float] = []
        for number, row in enumerate(folder.read_columns(part, _COLUMNS).to_pylist()):
            images += 1
            if (code := row["error"]) is not None:
                errors[code] += 1
                if errors[code] <= _MAX_EXAMPLES:
                    examples[code].append(row["path"])
                continue
            unknown += row["known"] is False
            labels, probabilities = row["classes"], row["probabilities"]
            counts.update(labels if multi_label else labels[:1])
            if not multi_label:
                classes.append(indices[labels[0]])
                confidences.append(probabilities[0])
            if labels:
                least.append((probabilities[0], part, number, row["path"], labels[0]))
        predictions.add(np.array(classes, int), np.array(confidences))
        least = heapq.nsmallest(LEAST_CERTAIN, least)
    drift = None
    if decision is not None and decision.reference is not None:
        tests = predictions.compare(decision.reference).tests
        drift = {name: DriftTest(**test._asdict(), alarm=test.alarm) for name, test in tests.items()}
    report = BatchReport(
        bundle=bundle.name,
        num_images=images,
        errors=tuple(
            ErrorKind(code=code, num_images=count, examples=tuple(examples[code]))
            for code, count in errors.most_common()
        ),
        unknown=unknown,
        counts={label: counts[label] for label in bundle.labels},
        least_certain=tuple(
            Uncertain(path=path, label=label, probability=probability)
            for probability, _, _, path, label in least
        ),
        drift=drift,
    )
    return report, [(part, row) for _, part, row, _, _ in least]


def _class_bars(report: BatchReport) -> Markup:
    largest = sorted(report.counts.items(), key=lambda item: -item[1])[:MAX_BARS]
    rows = [Bar(label=label, value=float(count), text=f"{count:,}") for label, count in largest]
    return svg_bars("classes-chart", "Images per class", rows, max(1.0, rows[0].value if rows else 1.0))


def _thumbnail(entry: ListedImage, bundle: Bundle, settings: Settings) -> Markup | None:
    """Build a thumbnail of the image *entry*; None if it does not exist any more."""
    rules = bundle.manifest.preprocess
    reader = Reader(settings.max_body_bytes)
    try:
        body = reader.read(entry)
        make_decoder(settings)(EncodedImage(body), rules)  # checks the limits
        image = open_image(body, max_bytes=len(body), max_pixels=settings.max_pixels)
        image.draft("RGB", (STORED, STORED))
        image = to_rgb(image, rules).copy()  # without metadata
    except ImageError:
        return None
    finally:
        reader.close()
    image.thumbnail((STORED, STORED))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    source = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    return Markup('<img src="{}" alt="{}" width="{}">').format(source, Path(entry.path).name, THUMBNAIL_WIDTH)
