"""Evaluate a checkpoint, a bundle or a server: `sopdeploy.evaluate` and `sopdeploy eval`."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal

from sopdeploy.api.options import EvaluateOptions
from sopdeploy.config import expand_options
from sopdeploy.data.datasets.layouts import open_evaluation_images
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.evaluation.heads import HeadAccuracy, score_heads
from sopdeploy.evaluation.metrics import ClassificationReport, Score, classification_report
from sopdeploy.evaluation.multi_label import MultiLabelPredictions, MultiLabelReport
from sopdeploy.evaluation.sources import detect_source
from sopdeploy.html.templates import render
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.report.predictions import metric_tiles, predictions_context
from sopdeploy.report.run_data import Mistake, Predictions, worst_mistakes

SERVICE = "sopdeploy.evaluation.service"  # imports the HTTP client, an optional part


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The metrics of a checkpoint, a bundle or a server on a folder of images.

    Attributes:
        source: The evaluated checkpoint, bundle or URL.
        kind: What *source* is.
        tta: Test-time augmentation.
        data: The folder of images.
        facts: Name, runtime and device of a bundle; empty for a checkpoint or a server.
        metrics: Accuracies with intervals, calibration error, precision and recall by class, confusion
            matrix. With several classes per image: mAP, F1, and metrics by class.
        labels: The sorted class names, to which the indices in *scores* refer.
        scores: One prediction per image, sorted by class name and then by file name. With several classes
            per image, all probabilities.
        heads: The accuracy of every head of a checkpoint, if `evaluate` was called with `heads=True`.
        notes: Lines about the images that are not as expected, such as classes without images.
    """

    source: str
    kind: Literal["checkpoint", "bundle", "service"]
    tta: str
    data: Path
    facts: dict[str, str]
    metrics: ClassificationReport | MultiLabelReport
    labels: tuple[str, ...]
    scores: tuple[Score, ...] | MultiLabelPredictions = field(repr=False)
    heads: tuple[HeadAccuracy, ...] = ()
    notes: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        mistakes: tuple[Mistake, ...] = ()
        if isinstance(self.scores, tuple):
            with suppress(DataError):  # the images may have been moved since
                images = open_evaluation_images(self.data, self.labels)
                mistakes = tuple(worst_mistakes(self.scores, images, Preprocess()))
        predictions = Predictions(metrics=self.metrics, mistakes=mistakes, images=self.data.name)
        return render(
            "sopdeploy.api",
            "scores.html",
            title=f"{self.source} on {self.data}",
            tiles={**metric_tiles(self.metrics), "images": str(self.metrics.count), **self.facts},
            notes=self.notes,
            reason="",
            next="",
            **predictions_context(predictions),
        )


@expand_options
def evaluate(
    source: str | Path,
    data: str | Path,
    *,
    options: EvaluateOptions,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
) -> Evaluation:
    """Evaluate a checkpoint, a bundle or a running server on a folder of images.

    Args:
        source: A checkpoint, a bundle, or the URL of a server.
        data: Folder of images, `DIR/<class>/*.jpg` or with `labels.csv`; classes are matched by name.
        options: The fields of `EvaluateOptions`, each as a keyword argument.
        on_image: Called with the numbers of images done and in total.

    Returns:
        The metrics; a notebook shows confusion matrix and worst mistakes.

    Raises:
        ConfigError: *source* cannot be evaluated, or an option does not apply to it.
        DataError: The classes do not match, or an image cannot be read.
    """
    name, data = str(source), Path(data)
    kind, facts = detect_source(name), {}
    _check_options(kind, options)
    tta, workers = options.tta, options.workers
    accuracies: tuple[HeadAccuracy, ...] = ()
    notes: list[str] = []
    if kind == "service":
        labels, scores = import_module(SERVICE).score_service(
            name, data, api_key=options.api_key, model=options.model, on_image=on_image, log=notes.append
        )
    elif kind == "bundle":
        from sopdeploy_service.commands.evaluate import scores_of_bundle
        from sopdeploy_service.settings import load_settings

        settings = load_settings(runtime=options.runtime)
        bundle = scores_of_bundle(
            Path(name), data, tta=tta, settings=settings, on_image=on_image, log=notes.append
        )
        labels, scores = bundle.labels, bundle.scores
        facts = {"bundle": bundle.bundle, "runtime": bundle.runtime, "device": bundle.device}
    elif options.heads:
        labels, scores, accuracies = score_heads(
            Path(name), data, workers=workers, on_image=on_image, log=notes.append
        )
    else:
        from sopdeploy.evaluation.prediction import score_checkpoint

        labels, scores = score_checkpoint(
            Path(name), data, tta=tta, workers=workers, on_image=on_image, log=notes.append
        )
    return Evaluation(
        source=name,
        kind=kind,
        tta=tta,
        data=data,
        facts=facts,
        metrics=classification_report(labels, scores) if isinstance(scores, list) else scores.report(),
        labels=labels,
        scores=tuple(scores) if isinstance(scores, list) else scores,
        heads=accuracies,
        notes=tuple(notes),
    )


def _check_options(kind: str, options: EvaluateOptions) -> None:
    """Raise `ConfigError` for an option that a source of this *kind* does not have."""
    if options.runtime is not None and kind != "bundle":
        raise ConfigError(
            f"only a bundle has a choice of runtimes, this is a {kind}; omit it", setting="runtime"
        )
    for setting in ("model", "api_key"):
        if getattr(options, setting) is not None and kind != "service":
            raise ConfigError(f"only for servers, this is a {kind}; omit it", setting=setting)
    if options.tta != "none" and kind == "service":
        raise ConfigError("not supported by servers; evaluate the bundle", setting="tta")
    if options.heads and (kind != "checkpoint" or options.tta != "none"):
        problem = "not with test-time augmentation" if kind == "checkpoint" else f"a {kind} has no branches"
        raise ConfigError(f"{problem}; evaluate the checkpoint, such as runs/latest/best.pt", setting="heads")
