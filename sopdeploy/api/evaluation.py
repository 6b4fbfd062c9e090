"""Evaluate a checkpoint or a bundle: `sopdeploy.evaluate` and `sopdeploy eval`."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sopdeploy.api.options import EvaluateOptions
from sopdeploy.config import expand_options
from sopdeploy.data.datasets.layouts import check_holds_classes
from sopdeploy.decision import Decision
from sopdeploy.errors import ConfigError
from sopdeploy.evaluation.metrics import ClassificationReport, ImageScore, classification_report
from sopdeploy.evaluation.multi_label import MultiLabelPredictions, MultiLabelReport
from sopdeploy.files import check_is_checkpoint

if TYPE_CHECKING:
    from sopdeploy.evaluation.prediction import HeadAccuracy


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The metrics of a checkpoint or a bundle on a folder of images.

    Attributes:
        source: The evaluated checkpoint or bundle.
        kind: What *source* is.
        facts: Name, runtime and device of a bundle; empty for a checkpoint.
        metrics: Accuracies with intervals, calibration error, precision and recall by class, confusion
            matrix. With several classes per image: mAP, F1, and metrics by class.
        labels: The sorted class names, to which the indices in *scores* refer.
        scores: One prediction per image, sorted by class name and then by file name. With several classes
            per image, all probabilities.
        heads: The accuracy of every head of a checkpoint, if `evaluate` was called with `heads=True`.
        decision: Temperature and thresholds that `fit_decision` fitted to the images; the metrics are those
            of the checkpoint before.
        notes: Lines about the images that are not as expected, such as classes without images.
    """

    source: str
    kind: Literal["checkpoint", "bundle"]
    facts: dict[str, str]
    metrics: ClassificationReport | MultiLabelReport
    labels: tuple[str, ...]
    scores: tuple[ImageScore, ...] | MultiLabelPredictions = field(repr=False)
    heads: "tuple[HeadAccuracy, ...]" = ()
    decision: Decision | None = None
    notes: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Return the output of `sopdeploy eval --json`."""
        heads = [head.model_dump(mode="json") for head in self.heads]
        return {
            "source": self.source,
            "kind": self.kind,
            **self.facts,
            "notes": list(self.notes),
            **({"heads": heads} if heads else {}),
            **({} if self.decision is None else {"decision": self.decision.model_dump(mode="json")}),
            **self.metrics.model_dump(mode="json"),
        }


@expand_options
def evaluate(
    source: str | Path,
    data: str | Path,
    *,
    options: EvaluateOptions,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
) -> Evaluation:
    """Evaluate a checkpoint or a bundle on a folder of images.

    Args:
        source: A checkpoint or a bundle.
        data: Folder of images, `DIR/<class>/*.jpg` or with `labels.csv`; classes are matched by name.
        on_image: Called with the numbers of images done and in total.

    Returns:
        The metrics and the predictions.

    Raises:
        ConfigError: *source* cannot be evaluated, or an option does not apply to it.
        DataError: The classes do not match, an image cannot be read, or `fit_decision` gets fewer than 50
            images.
    """
    name, data = str(source), Path(data)
    kind = detect_source(name)
    _check_options(name, kind, options)
    notes: list[str] = []
    facts: dict[str, str] = {}
    heads: tuple[HeadAccuracy, ...] = ()
    decision = None
    shared: Any = {"on_image": on_image, "log": notes.append}
    if kind == "bundle":
        from sopdeploy_service.commands.evaluate import scores_of_bundle
        from sopdeploy_service.settings import load_settings

        settings = load_settings(runtime=options.runtime)
        labels, scores, facts = scores_of_bundle(Path(name), data, settings=settings, **shared)
    else:
        check_is_checkpoint(Path(name))
        check_holds_classes(data)
        from sopdeploy.checkpoint import write_checkpoint
        from sopdeploy.evaluation.checkpoint_scores import score_checkpoint

        found = score_checkpoint(Path(name), data, heads=options.heads, workers=options.workers, **shared)
        labels, scores, heads = found.labels, found.predictions, found.heads
        if options.fit_decision is not None:
            decision = found.fit(options.accepts)
            write_checkpoint(options.fit_decision, replace(found.checkpoint, decision=decision))
    return Evaluation(
        source=name,
        kind=kind,
        facts=facts,
        metrics=classification_report(labels, scores) if isinstance(scores, list) else scores.report(),
        labels=labels,
        scores=tuple(scores) if isinstance(scores, list) else scores,
        heads=heads,
        decision=decision,
        notes=tuple(notes),
    )


def detect_source(source: str) -> Literal["checkpoint", "bundle"]:
    """Detect what *source* names; raises `ConfigError` if it cannot be evaluated."""
    if "://" in source:
        raise ConfigError(f"{source}: is a URL; give a checkpoint or a bundle")
    path = Path(source)
    if not path.is_dir():
        return "checkpoint"
    if (path / "manifest.json").is_file():
        return "bundle"
    if (path / "best.pt").is_file():
        raise ConfigError(f"{source}: is a run folder; give {path / 'best.pt'}")
    raise ConfigError(f"{source}: not a bundle, it has no manifest.json; give a checkpoint or a bundle")


def _check_options(source: str, kind: str, options: EvaluateOptions) -> None:
    """Raise `ConfigError` for an option that *source* of this *kind* does not have."""
    kinds = {"runtime": "bundle", "heads": "checkpoint", "fit_decision": "checkpoint"}
    for setting, needed in kinds.items():
        if getattr(options, setting) and kind != needed:
            raise ConfigError(f"only for a {needed}, this is a {kind}; omit it", setting=setting)
    fitted = options.fit_decision
    if fitted is not None and fitted.exists() and Path(source).exists() and fitted.samefile(source):
        raise ConfigError(
            "is the evaluated checkpoint; give another file", setting="fit_decision", value=fitted
        )
