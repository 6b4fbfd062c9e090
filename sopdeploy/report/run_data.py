"""Read what the report shows: history, recipe, and the predictions of the best network."""

import base64
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from torch import Tensor

from sopdeploy.checkpoint import Checkpoint, build_classifier, read_checkpoint
from sopdeploy.config import first_problem
from sopdeploy.data.base import LabeledImages
from sopdeploy.data.datasets.layouts import open_evaluation_images
from sopdeploy.data.image_files import ImageFiles
from sopdeploy.data.sources import open_data
from sopdeploy.decision import Decision
from sopdeploy.errors import CheckpointError, ConfigError, DataError
from sopdeploy.evaluation.metrics import ClassificationReport, Score, classification_report
from sopdeploy.evaluation.multi_label import MultiLabelPredictions, MultiLabelReport
from sopdeploy.evaluation.prediction import predict_checkpoint
from sopdeploy.html.templates import percent
from sopdeploy.images.pixels import to_rgb
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.training.diagnostics import EpochRow
from sopdeploy.training.procedure import select_split
from sopdeploy.training.recipe import Recipe, validate_recipe
from sopdeploy.training.run import Position

MAX_MISTAKES = 24
THUMBNAIL_SIDE = 128  # pixels of the longer side
JPEG_QUALITY = 75
OUT_OF_FOLD = "the training images, each predicted by a network that was fitted without it"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mistake:
    """A wrongly classified image: its file in the data, its caption, and a small JPEG in base64.

    `file` is empty for images that are not files.
    """

    file: str
    caption: str
    jpeg: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """Metrics and worst mistakes on the images that `images` describes.

    With several classes per image there is no list of mistakes.
    """

    metrics: ClassificationReport | MultiLabelReport
    mistakes: tuple[Mistake, ...]
    images: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """The contents of a report; if images are missing, `predictions` is None and `reason` explains why.

    `model` is the name of the trained network, `config` its complete config, and `train_count` the number of
    its training images.
    """

    recipe: Recipe
    model: str
    config: dict[str, Any]
    train_count: int
    labels: tuple[str, ...]
    history: tuple[EpochRow, ...]
    record: dict[str, Any]
    predictions: Predictions | None
    reason: str = ""
    decision: Decision | None = None


def read_run(run: Path, data: Path | None, on_image: Callable[[int, int], None]) -> RunData:
    """Read the run in the folder *run* and evaluate its `best.pt`.

    The images are those of the folder *data*, by default the held-out images of the recipe, if available.
    Raises `ConfigError` for a folder without a finished epoch, `CheckpointError` for invalid checkpoints, and
    `DataError` for an invalid *data*.
    """
    last, best = run / "last.pt", run / "best.pt"
    if not last.is_file() or not best.is_file():
        raise ConfigError(f"{run}: holds no run with a finished epoch; give a folder of `sopdeploy train`")
    stored = read_checkpoint(last)
    recipe = validate_recipe(stored.training.get("recipe", {}), str(last))
    history = read_history(stored, last)
    checkpoint = read_checkpoint(best)
    predictions, reason = None, ""
    try:
        images, description = _open_images(recipe, checkpoint, data)
    except (ConfigError, DataError) as error:
        if data is not None:
            raise
        reason = str(error)
    else:
        logits_NC = None if data is not None else _out_of_fold_logits(stored, checkpoint, len(images))
        if logits_NC is None:
            model, workers = build_classifier(checkpoint, best), recipe.workers
            predicted = predict_checkpoint(model, checkpoint, images, workers=workers, on_image=on_image)
        else:
            predicted, description = _predict_out_of_fold(logits_NC, checkpoint, images), OUT_OF_FOLD
        predictions = _measure(predicted, images, checkpoint.preprocess, description)
    return RunData(
        recipe=recipe,
        model=checkpoint.model,
        config=checkpoint.config,
        train_count=int((stored.resume or {}).get("train_count", 0)),
        labels=stored.labels,
        history=history,
        record=checkpoint.training,
        predictions=predictions,
        reason=reason,
        decision=checkpoint.decision,
    )


def read_history(checkpoint: Checkpoint, source: Path) -> tuple[EpochRow, ...]:
    """Return the epochs of *checkpoint*, read from *source*; raise `CheckpointError` if there are none."""
    try:
        history = Position.model_validate((checkpoint.resume or {})["position"]).history
    except pydantic.ValidationError as error:
        raise CheckpointError(f"{source}: {first_problem(error)}; train again") from error
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{source}: holds no history; give the last.pt of a run") from error
    if not history:
        raise CheckpointError(f"{source}: no epoch of the run is finished; resume it")
    return history


def _open_images(recipe: Recipe, checkpoint: Checkpoint, data: Path | None) -> tuple[LabeledImages, str]:
    """Open the images to evaluate; return them and a description."""
    if data is not None:
        multi_label = checkpoint.decision is not None and checkpoint.decision.thresholds is not None
        labels = checkpoint.labels if multi_label else tuple(sorted(checkpoint.labels))
        return open_evaluation_images(data, labels, multi_label=multi_label), f"the images in {data.name}"
    split, few_shot = select_split(recipe, open_data(recipe.data))
    held_out = split.held_out if len(split.held_out) else split.train
    if set(held_out.labels) != set(checkpoint.labels):
        raise DataError("the classes of the data have changed since the run started; give the images as data")
    if few_shot:
        return held_out, "the held-out images"
    return (
        held_out,
        "the held-out images, which also selected the epoch, so all scores of this section are too high",
    )


def _out_of_fold_logits(last: Checkpoint, best: Checkpoint, images: int) -> Tensor | None:
    """Get the out-of-fold logits (N, C) of a cross-validated run; None unless there is a row per image."""
    if best.training.get("few_shot", {}).get("estimated_on") != "cross-validation":
        return None
    logits_NC: Tensor | None = (last.resume or {}).get("out_of_fold")
    return logits_NC if logits_NC is not None and len(logits_NC) == images else None


def _predict_out_of_fold(
    logits_NC: Tensor, checkpoint: Checkpoint, images: LabeledImages
) -> list[Score] | MultiLabelPredictions:
    """Predict the training *images* by their out-of-fold logits (N, C)."""
    decision = checkpoint.decision or Decision()
    if decision.thresholds is not None:
        return MultiLabelPredictions(
            labels=images.labels,
            targets=images.targets.astype(np.float64),
            probabilities=logits_NC.double().sigmoid().numpy(),
            thresholds=decision.thresholds,
        )
    scaled_NC = logits_NC.double() / decision.temperature
    probabilities = scaled_NC.softmax(dim=1)
    rankings = probabilities.argsort(dim=1, descending=True, stable=True).tolist()
    return [
        Score.from_ranking(target, [(column, row[column]) for column in ranked], **decision.review(logits))
        for target, ranked, row, logits in zip(
            images.targets.tolist(), rankings, probabilities.tolist(), scaled_NC.numpy(), strict=True
        )
    ]


def _measure(
    predicted: list[Score] | MultiLabelPredictions,
    images: LabeledImages,
    preprocess: Preprocess,
    description: str,
) -> Predictions:
    if isinstance(predicted, MultiLabelPredictions):
        return Predictions(metrics=predicted.report(), mistakes=(), images=description)
    mistakes = tuple(worst_mistakes(predicted, images, preprocess))
    metrics = classification_report(images.labels, predicted)
    return Predictions(metrics=metrics, mistakes=mistakes, images=description)


def worst_mistakes(scores: Sequence[Score], images: LabeledImages, preprocess: Preprocess) -> list[Mistake]:
    """Select the wrong predictions with the highest confidence."""
    wrong = [(-score.confidence, index) for index, score in enumerate(scores) if not score.correct]
    mistakes = []
    for _, index in sorted(wrong)[:MAX_MISTAKES]:
        score, file = scores[index], io.BytesIO()
        true, predicted = images.labels[score.target], images.labels[score.top5[0]]
        caption = (
            f"{true} ({percent(score.likelihood)}), predicted as {predicted} ({percent(score.confidence)})"
        )
        small = to_rgb(images[index][0], preprocess).copy()  # without metadata such as time and place
        small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        small.save(file, "JPEG", quality=JPEG_QUALITY)
        name = os.fsdecode(images.paths[index]) if isinstance(images, ImageFiles) else ""
        jpeg = base64.b64encode(file.getvalue()).decode("ascii")
        mistakes.append(Mistake(file=name, caption=caption, jpeg=jpeg))
    return mistakes
