"""Read what the report shows: history, recipe, and the predictions of the best network."""

import base64
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pydantic
from torch import Tensor

from sopdeploy.checkpoint import Checkpoint, build_classifier, read_checkpoint
from sopdeploy.config import first_problem
from sopdeploy.data.base import LabeledImages
from sopdeploy.data.image_files import ImageFiles
from sopdeploy.data.sources import open_data
from sopdeploy.errors import CheckpointError, ConfigError, DataError
from sopdeploy.evaluation.metrics import ClassificationReport, Score, classification_report
from sopdeploy.evaluation.multi_label import MultiLabelPredictions, MultiLabelReport
from sopdeploy.evaluation.prediction import open_images_of, predict_images
from sopdeploy.evaluation.predictions import make_predictions
from sopdeploy.html.templates import percent
from sopdeploy.images.pixels import to_rgb
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.training.diagnostics import EpochRow
from sopdeploy.training.procedure import select_procedure
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

    `best` is the checkpoint of the best epoch, `train_count` the number of training images.
    """

    recipe: Recipe
    best: Checkpoint
    train_count: int
    history: tuple[EpochRow, ...]
    predictions: Predictions | None
    reason: str = ""


def read_run(
    run: Path, data: Path | None = None, on_image: Callable[[int, int], None] = lambda _done, _total: None
) -> RunData:
    """Read the run in the folder *run* and evaluate its `best.pt`.

    The images are those of the folder *data*, by default the held-out images of the recipe, if available.
    Raises `ConfigError` for a folder without a finished epoch, `CheckpointError` for invalid checkpoints, and
    `DataError` for an invalid *data*.
    """
    path, best_path = run / "last.pt", run / "best.pt"
    if not path.is_file() or not best_path.is_file():
        raise ConfigError(f"{run}: holds no run with a finished epoch; give a folder of `sopdeploy train`")
    last, best = read_checkpoint(path), read_checkpoint(best_path)
    recipe = validate_recipe(last.training.get("recipe", {}), str(path))
    history, predictions, reason = read_history(last, path), None, ""
    try:
        images, description = _open_images(recipe, best, data)
    except (ConfigError, DataError) as error:
        if data is not None:
            raise
        reason = str(error)
    else:
        out_of_fold_NC = None if data is not None else _out_of_fold_logits(last, best, len(images))
        if out_of_fold_NC is None:
            model = build_classifier(best, best_path)
            predicted = predict_images(model, best, images, workers=recipe.workers, on_image=on_image)
        else:
            views_N1C = out_of_fold_NC.double().numpy()[:, None]
            predicted = make_predictions(views_N1C, images, images.labels, best.decision)
            description = OUT_OF_FOLD
        if isinstance(predicted, MultiLabelPredictions):
            predictions = Predictions(metrics=predicted.report(), mistakes=(), images=description)
        else:
            metrics = classification_report(images.labels, predicted)
            mistakes = worst_mistakes(predicted, images, best.preprocess)
            predictions = Predictions(metrics=metrics, mistakes=tuple(mistakes), images=description)
    return RunData(
        recipe=recipe,
        best=best,
        train_count=int((last.resume or {}).get("train_count", 0)),
        history=history,
        predictions=predictions,
        reason=reason,
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
        return open_images_of(checkpoint, data), f"the images in {data.name}"
    split, few_shot, _ = select_procedure(recipe, open_data(recipe.data), checkpoint.training)
    # Without held-out images, the score was cross-validated on the training images.
    images = split.held_out if len(split.held_out) else split.train
    if set(images.labels) != set(checkpoint.labels):
        raise DataError("the classes of the data have changed since the run started; give the images as data")
    note = "" if few_shot else ", which also selected the epoch, so all scores of this section are too high"
    return images, f"the held-out images{note}"


def _out_of_fold_logits(last: Checkpoint, best: Checkpoint, images: int) -> Tensor | None:
    """Get the out-of-fold logits (N, C) of a cross-validated run; None unless there is a row per image."""
    if best.training.get("few_shot", {}).get("estimated_on") != "cross-validation":
        return None
    logits_NC: Tensor | None = (last.resume or {}).get("out_of_fold")
    return logits_NC if logits_NC is not None and len(logits_NC) == images else None


def worst_mistakes(scores: Sequence[Score], images: LabeledImages, preprocess: Preprocess) -> list[Mistake]:
    """Select the wrong predictions with the highest confidence."""
    wrong = [(-score.confidence, index) for index, score in enumerate(scores) if not score.correct]
    mistakes = []
    for _, index in sorted(wrong)[:MAX_MISTAKES]:
        score = scores[index]
        true, predicted = images.labels[score.target], images.labels[score.top5[0]]
        caption = (
            f"{true} ({percent(score.likelihood)}), predicted as {predicted} ({percent(score.confidence)})"
        )
        small = to_rgb(images[index][0], preprocess).copy()  # without metadata such as time and place
        small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        encoded = io.BytesIO()
        small.save(encoded, "JPEG", quality=JPEG_QUALITY)
        jpeg = base64.b64encode(encoded.getvalue()).decode("ascii")
        file = os.fsdecode(images.paths[index]) if isinstance(images, ImageFiles) else ""
        mistakes.append(Mistake(file=file, caption=caption, jpeg=jpeg))
    return mistakes
