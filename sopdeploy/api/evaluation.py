"""Evaluate a checkpoint, a bundle or a server: `sopdeploy.evaluate` and `sopdeploy eval`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sopdeploy.api.options import EvaluateOptions
from sopdeploy.config import expand_options
from sopdeploy.errors import ConfigError
from sopdeploy.evaluation.metrics import ClassificationReport, ImageScore, classification_report
from sopdeploy.evaluation.multi_label import MultiLabelPredictions, MultiLabelReport
from sopdeploy.evaluation.prediction import HeadAccuracy


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The metrics of a checkpoint, a bundle or a server on a folder of images.

    Attributes:
        source: The evaluated checkpoint, bundle or URL.
        kind: What *source* is.
        tta: Test-time augmentation.
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
    facts: dict[str, str]
    metrics: ClassificationReport | MultiLabelReport
    labels: tuple[str, ...]
    scores: tuple[ImageScore, ...] | MultiLabelPredictions = field(repr=False)
    heads: tuple[HeadAccuracy, ...] = ()
    notes: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Return the output of `sopdeploy eval --json`."""
        heads = [head.model_dump(mode="json") for head in self.heads]
        return {
            "source": self.source,
            "kind": self.kind,
            "tta": self.tta,
            **self.facts,
            "notes": list(self.notes),
            **({"heads": heads} if heads else {}),
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
    """Evaluate a checkpoint, a bundle or a running server on a folder of images.

    Args:
        source: A checkpoint, a bundle, or the URL of a server.
        data: Folder of images, `DIR/<class>/*.jpg` or with `labels.csv`; classes are matched by name.
        options: The fields of `EvaluateOptions`, each as a keyword argument.
        on_image: Called with the numbers of images done and in total.

    Returns:
        The metrics and the predictions.

    Raises:
        ConfigError: *source* cannot be evaluated, or an option does not apply to it.
        DataError: The classes do not match, or an image cannot be read.
    """
    name, data = str(source), Path(data)
    kind = detect_source(name)
    _check_options(kind, options)
    notes: list[str] = []
    facts: dict[str, str] = {}
    heads: tuple[HeadAccuracy, ...] = ()
    shared: Any = {"on_image": on_image, "log": notes.append}
    if kind == "service":
        from sopdeploy.evaluation.service import score_service

        labels, scores = score_service(name, data, api_key=options.api_key, model=options.model, **shared)
    elif kind == "bundle":
        from sopdeploy_service.commands.evaluate import scores_of_bundle
        from sopdeploy_service.settings import load_settings

        settings = load_settings(runtime=options.runtime)
        labels, scores, facts = scores_of_bundle(
            Path(name), data, tta=options.tta, settings=settings, **shared
        )
    else:
        from sopdeploy.evaluation.prediction import score_checkpoint

        labels, scores, heads = score_checkpoint(
            Path(name), data, tta=options.tta, heads=options.heads, workers=options.workers, **shared
        )
    return Evaluation(
        source=name,
        kind=kind,
        tta=options.tta,
        facts=facts,
        metrics=classification_report(labels, scores) if isinstance(scores, list) else scores.report(),
        labels=labels,
        scores=tuple(scores) if isinstance(scores, list) else scores,
        heads=heads,
        notes=tuple(notes),
    )


def detect_source(source: str) -> Literal["checkpoint", "bundle", "service"]:
    """Detect what *source* names; raises `ConfigError` if it cannot be evaluated."""
    if source.startswith(("http://", "https://")):
        return "service"
    if "://" in source:
        raise ConfigError(f"{source}: only services on http:// and https:// can be evaluated")
    path = Path(source)
    if not path.is_dir():
        return "checkpoint"
    if (path / "manifest.json").is_file():
        return "bundle"
    if (path / "best.pt").is_file():
        raise ConfigError(f"{source}: is a run folder; give {path / 'best.pt'}")
    raise ConfigError(
        f"{source}: not a bundle, it has no manifest.json; give a checkpoint, a bundle or a URL"
    )


def _check_options(kind: str, options: EvaluateOptions) -> None:
    """Raise `ConfigError` for an option that a source of this *kind* does not have."""
    kinds = {"runtime": "bundle", "model": "service", "api_key": "service", "heads": "checkpoint"}
    for setting, needed in kinds.items():
        if getattr(options, setting) and kind != needed:
            raise ConfigError(f"only for a {needed}, this is a {kind}; omit it", setting=setting)
    if options.tta != "none" and kind == "service":
        raise ConfigError("not supported by servers; evaluate the bundle", setting="tta")
    if options.heads and options.tta != "none":
        raise ConfigError("not with test-time augmentation", setting="heads")
