"""`sopdeploy.evaluate` and `sopdeploy eval`: measure a network, and fit its temperature and thresholds."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from sopdeploy.base.config import Options
from sopdeploy.bundle.decision import ACCEPTS, Decision
from sopdeploy.bundle.folder import follow_link, open_bundle, read_manifest
from sopdeploy.bundle.publication import check_can_be_fitted, publish_decision
from sopdeploy.cli.command import command, expand_options
from sopdeploy.cli.console import err, plain_text, print_field, print_table, say
from sopdeploy.data.photos.files import data_folder
from sopdeploy.data.photos.outputs import check_takes_output
from sopdeploy.errors import ConfigError
from sopdeploy.evaluation.exchanged import describe_exchanged
from sopdeploy.evaluation.metrics import ClassificationReport, ImageScore
from sopdeploy.evaluation.multi_label import MultiLabelPredictions, MultiLabelReport
from sopdeploy.evaluation.predictions import describe_predictions, measure_predictions
from sopdeploy.paths import what_is
from sopdeploy.weights.files import check_is_checkpoint

_MAX_ROWS = 50  # of a table; the page of a run and --json have all
MAX_COLUMNS = 13  # with more, the terminal shows no confusion matrix


class EvaluateOptions(Options):
    """Options of `sopdeploy.evaluate` and `sopdeploy eval`."""

    KEYS: ClassVar = ("runtime", "accepts", "mirror", "workers")

    runtime: str | None = None
    """Runtime of a bundle, as for `serve`; tensorrt uses the engine."""
    fit_decision: Path | None = None
    """Fit temperature and threshold for unknown images to these images, and write a copy with them: of a
    checkpoint to this file, of a bundle into this folder; for several classes per image, a threshold per class."""
    accepts: Annotated[float, pydantic.Field(gt=0, le=1)] = ACCEPTS
    """Fraction of images of known classes to accept as known, with the fitted threshold; 1 rejects none."""
    mirror: bool = False
    """Average the logits of each image and of its mirror image; a server classifies the image alone."""
    workers: Annotated[int, pydantic.Field(ge=0)] = 0
    """Processes that load images for a checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The metrics of a checkpoint or a bundle on a folder of images.

    Attributes:
        source: The evaluated checkpoint or bundle, without the links `latest` and `live`.
        kind: What *source* is.
        facts: Name, runtime and device of a bundle; empty for a checkpoint.
        metrics: Accuracies with intervals, log loss, precision and recall by class, confusion matrix. With
            several classes per image: mAP, F1, and metrics by class.
        labels: The sorted class names, to which the indices in *scores* refer.
        scores: One prediction per image, sorted by class name and then by file name. With several classes
            per image, all probabilities.
        decision: Temperature and thresholds that `fit_decision` fitted to the images; the metrics are those
            of the checkpoint before.
        mirror: Whether the mean logits of each image and its mirror image were scored.
        notes: Lines about the images that are not as expected, such as classes without images.
        fitted: The copy of *source* that has this decision.
    """

    source: str
    kind: Literal["checkpoint", "bundle"]
    facts: dict[str, str]
    metrics: ClassificationReport | MultiLabelReport
    labels: tuple[str, ...]
    scores: tuple[ImageScore, ...] | MultiLabelPredictions = field(repr=False)
    decision: Decision | None = None
    mirror: bool = False
    notes: tuple[str, ...] = ()
    fitted: Path | None = None

    def summary(self) -> dict[str, object]:
        """Return the output of `sopdeploy eval --json`."""
        fitted = {}
        if self.decision is not None:
            fitted = {
                "decision": self.decision.model_dump(mode="json"),
                "fitted": str(self.fitted),
            }
        return {
            "source": self.source,
            "kind": self.kind,
            **self.facts,
            "mirror": self.mirror,
            "notes": list(self.notes),
            **fitted,
            **self.metrics.model_dump(mode="json"),
        }


def _show(evaluation: Evaluation) -> None:
    """Print the metrics, and the first rows of the tables that a terminal has room for."""
    for note in evaluation.notes:
        err.print(plain_text(f"warning: {note}"))

    # A link such as `latest` does not tell which bundle it leads to.
    evaluated = f"{evaluation.kind} {evaluation.facts.get('bundle', evaluation.source)}"
    mirrored = " with their mirror images" if evaluation.mirror else ""
    section = describe_predictions(
        evaluation.metrics, f"{evaluated}: {evaluation.metrics.count} images{mirrored}"
    )

    say(*section.text)
    for table in section.tables:
        if table.rows and len(table.columns) <= MAX_COLUMNS:
            say("", table.caption)
            print_table(table.columns, (map(str, row) for row in table.rows[:_MAX_ROWS]))
    if evaluation.decision is not None:
        say(*(f"{name}: {text}" for name, text in evaluation.decision.rows()))
        print_field("written", str(evaluation.fitted), style="bold green")


@command(
    _show,
    summarize=Evaluation.summary,
    options={"data"},
    examples=(
        "sopdeploy eval runs/latest/best.pt --data test-photos",
        "sopdeploy eval ckpt.pt --data test-photos --fit-decision fitted.pt",
        "sopdeploy eval bundles/resnet50-3f6c01d2a4b7 --data test-photos --fit-decision bundles",
        "sopdeploy eval bundles/photos-3f6c01d2a4b7 --data test-photos --set mirror=true",
    ),
)
@expand_options
def evaluate(
    source: str | Path,
    data: str | Path,
    *,
    options: EvaluateOptions,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
) -> Evaluation:
    """Evaluate a checkpoint or a bundle on a folder of images.

    Classes are matched by name, and classes without images are listed and left out. Accuracies have
    Wilson 95 % intervals. If a rejection threshold was fitted, the output includes the fraction
    of accepted images. A network with several classes per image needs a folder with
    `labels.csv`. Its metrics are mAP, and F1 of each class at the threshold of the class.

    --fit-decision writes a copy of the checkpoint or bundle with a temperature and a threshold that are
    fitted to these images. Use it for imported checkpoints, for your own networks, and if new images differ
    from the validation images. The printed metrics are measured before the fit.

    Args:
        source: A checkpoint or a bundle.
        data: Folder of images, DIR/<class>/*.jpg or with labels.csv.
        on_image: Called with the numbers of images done and in total.

    Returns:
        The metrics of the images, and for a checkpoint the decision that was fitted.

    Raises:
        CheckpointError: *source* is neither a checkpoint nor a bundle.
        ConfigError: An option does not apply to *source*.
        DataError: The classes do not match, an image cannot be read, or `fit_decision` gets fewer than 50
            images.

    Examples:
        >>> evaluation = sopdeploy.evaluate("runs/latest/best.pt", "test-photos")
        >>> evaluation.metrics.count
        60
    """
    # A link leads to another run or bundle later.
    path = follow_link(Path(source))
    path = follow_link(path.parent) / path.name if path.is_file() else path
    data = Path(data)
    # A folder of bundles is an error that names one of them.
    is_bundle = what_is(path) in {"bundle", "bundles"}
    kind: Literal["checkpoint", "bundle"] = "bundle" if is_bundle else "checkpoint"
    _check_options(path, kind, options)

    notes: list[str] = []
    facts: dict[str, str] = {}  # stays empty for a checkpoint
    fitted = options.fit_decision
    accepts = None if fitted is None else options.accepts
    shared: Any = {"mirror": options.mirror, "on_image": on_image, "log": notes.append}

    # A bundle is scored in its runtime as it serves, a checkpoint in torch.
    if kind == "bundle":
        from sopdeploy_commands.scores import scores_of_bundle
        from sopdeploy_service.settings import load_settings

        settings = load_settings(runtime=options.runtime)
        labels, scores, facts, decision = scores_of_bundle(
            path, data, settings=settings, accepts=accepts, **shared
        )
        if fitted is not None and decision is not None:
            fitted = publish_decision(open_bundle(path), decision, fitted)
    else:
        check_is_checkpoint(path)
        data_folder(data)
        from sopdeploy.evaluation.checkpoint_scores import score_checkpoint
        from sopdeploy.weights.checkpoint import write_checkpoint

        checkpoint, labels, scores, decision = score_checkpoint(
            path, data, accepts=accepts, workers=options.workers, **shared
        )
        if fitted is not None:
            write_checkpoint(fitted, replace(checkpoint, decision=decision))

    metrics = measure_predictions(scores, labels)
    if isinstance(metrics, ClassificationReport):
        notes += describe_exchanged([row.label for row in metrics.classes], metrics.confusion)

    return Evaluation(
        source=str(path),
        kind=kind,
        facts=facts,
        metrics=metrics,
        labels=labels,
        # Only with one class per image, this is a list.
        scores=tuple(scores) if isinstance(scores, list) else scores,
        decision=decision,
        mirror=options.mirror,
        notes=tuple(notes),
        fitted=fitted,
    )


def _check_options(source: Path, kind: str, options: EvaluateOptions) -> None:
    """Raise `ConfigError` for an option that *source* of this *kind* does not have, or that overwrites it.

    It is also raised for a decision that would be fitted to the means with mirror images.
    """
    if options.runtime and kind != "bundle":
        raise ConfigError(
            f"works only with a bundle, but this is a {kind}; omit it", setting="runtime"
        )

    fitted = options.fit_decision
    if fitted is not None and options.mirror:
        message = "is for servers, which do not add the mirror image; omit mirror"
        raise ConfigError(message, setting="fit_decision")
    if fitted is not None and fitted.exists() and source.exists() and fitted.samefile(source):
        message = f"is the evaluated {kind}; give another place"
        raise ConfigError(message, setting="fit_decision", value=fitted)
    if fitted is not None and kind == "bundle":
        if fitted.is_file():
            message = "is a file, but the copy of a bundle needs a folder; give another place"
            raise ConfigError(message, setting="fit_decision", value=fitted)
        check_takes_output(fitted, "fit_decision")
        check_can_be_fitted(read_manifest(source))
