"""Read what the report shows: history, recipe, and the predictions of the best network."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from numpy.typing import NDArray
from torch import Tensor

from sopdeploy.checkpoint import Checkpoint, build_classifier, read_checkpoint
from sopdeploy.config import Fraction, StrictModel, first_problem
from sopdeploy.data.base import LabeledImages
from sopdeploy.data.image_files import hash_images
from sopdeploy.data.sources import open_data
from sopdeploy.decision import softmax
from sopdeploy.errors import CheckpointError, ConfigError, DataError
from sopdeploy.evaluation.metrics import ClassificationReport, ImageScore, classification_report
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

_MAX_MISTAKES, _MAX_GROUPS, _MAX_COPIES = 24, 12, 4  # shown images, groups, and images of a group
THUMBNAIL_SIDE = 128  # pixels of the longer side
JPEG_QUALITY = 75
OUT_OF_FOLD = "the training images, each predicted by a network that was fitted without it"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mistake:
    """A shown image, such as a wrongly classified one: its file in the data, caption, and JPEG in base64.

    `file` is empty for images that are not files.
    """

    file: str
    caption: str
    jpeg: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedImages:
    """Metrics and worst mistakes on the images that `description` names.

    With several classes per image there is no list of mistakes.
    """

    metrics: ClassificationReport | MultiLabelReport
    mistakes: tuple[Mistake, ...]
    description: str


class WrongLabel(StrictModel):
    """An image whose label the others contradict: the more probable class, and both probabilities.

    The probabilities are those of a classifier that was fitted without the image and its copies.
    """

    file: str
    label: str
    suggested: str
    probability: Fraction
    probability_suggested: Fraction


Gallery = tuple[Mistake, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """The contents of a report; if images are missing, `predictions` is None and `reason` explains why.

    `best` is the checkpoint of the best epoch, `train_count` the number of training images. `wrong_labels`
    are training images whose label is probably wrong, and `groups` copies of one photograph.
    """

    recipe: Recipe
    best: Checkpoint
    train_count: int
    history: tuple[EpochRow, ...]
    predictions: EvaluatedImages | None = None
    reason: str = ""
    wrong_labels: Gallery = ()
    groups: tuple[Gallery, ...] = ()


def read_run(
    run: Path, data: Path | None = None, on_image: Callable[[int, int], None] = lambda _done, _total: None
) -> RunData:
    """Read the run in the folder *run* and evaluate its `best.pt`.

    The images are those of the folder *data*, by default the held-out images of the recipe, if available.
    Raises `ConfigError` for a folder without a finished epoch, `CheckpointError` for invalid checkpoints, and
    `DataError` for an invalid *data*.
    """
    recipe, last = _open_run(run)
    best = read_checkpoint(run / "best.pt")
    train_count = int((last.resume or {}).get("train_count", 0))
    history = read_history(last, run / "last.pt")
    content = RunData(recipe=recipe, best=best, train_count=train_count, history=history)
    if data is not None:
        predictions = _predict(
            run, content, open_images_of(best, data), f"the images in {data.name}", on_image
        )
        return replace(content, predictions=predictions)
    try:
        split = select_procedure(recipe, open_data(recipe.data)).data
        # Without held-out images, the score was cross-validated on the training images.
        images = split.held_out if len(split.held_out) else split.train
        if set(images.labels) != set(best.labels):
            raise DataError(
                "the classes of the data have changed since the run started; give the images as data"
            )
    except (ConfigError, DataError) as error:
        return replace(content, reason=str(error))
    state = _procedure_state(last)
    logits_NC = state.get("out_of_fold")
    if images is split.train and logits_NC is not None and len(logits_NC) == len(images):
        views_N1C = logits_NC.double().numpy()[:, None]
        predicted = make_predictions(views_N1C, images, images.labels, best.decision)
        predictions = _summarize(predicted, images, best, OUT_OF_FOLD)
    else:
        note = ", which also selected the epoch, so all scores of this section are too high"
        description = f"the held-out images{note if recipe.procedure.kind == 'loop' else ''}"
        predictions = _predict(run, content, images, description, on_image)
    galleries = _training_galleries(split.train, state, last.preprocess)
    return replace(content, predictions=predictions, **galleries)


def _open_run(run: Path) -> tuple[Recipe, Checkpoint]:
    """Read the recipe and the last checkpoint of the run in the folder *run*."""
    path = run / "last.pt"
    if not path.is_file() or not (run / "best.pt").is_file():
        raise ConfigError(f"{run}: holds no run with a finished epoch; give a folder of `sopdeploy train`")
    last = read_checkpoint(path)
    return validate_recipe(last.training.get("recipe", {}), str(path)), last


def _predict(
    run: Path, content: RunData, images: LabeledImages, description: str, on_image: Callable[[int, int], None]
) -> EvaluatedImages:
    """Evaluate the network in `best.pt` on *images*."""
    model = build_classifier(content.best, run / "best.pt")
    workers = content.recipe.workers
    predicted = predict_images(model, content.best, images, workers=workers, on_image=on_image)
    return _summarize(predicted, images, content.best, description)


def _summarize(
    predicted: MultiLabelPredictions | Sequence[ImageScore],
    images: LabeledImages,
    best: Checkpoint,
    description: str,
) -> EvaluatedImages:
    """Compute the metrics and find the worst mistakes of the predictions for *images*."""
    if isinstance(predicted, MultiLabelPredictions):
        return EvaluatedImages(metrics=predicted.report(), mistakes=(), description=description)
    metrics = classification_report(images.labels, predicted)
    mistakes = worst_mistakes(predicted, images, best.preprocess)
    return EvaluatedImages(metrics=metrics, mistakes=tuple(mistakes), description=description)


def find_wrong_labels(run: Path, data: Path | None = None) -> tuple[WrongLabel, ...]:
    """Find the training images of the run in the folder *run* whose label is probably wrong, the worst first.

    *data* is the folder of the images, by default that of the recipe. Raises `ConfigError` for a run without
    out-of-fold predictions of one class per image, `DataError` if the images have changed since the run.
    """
    recipe, last = _open_run(run)
    if data is not None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": data})})
    images = select_procedure(recipe, open_data(recipe.data)).data.train
    logits_NC = _procedure_state(last).get("label_logits")
    if logits_NC is None:
        raise ConfigError(
            f"{run}: has no out-of-fold predictions of files with one class each; give a run of the few-shot "
            "procedure on such files"
        )
    if not np.array_equal(np.unique(hash_images(images)), np.asarray(last.image_hashes)):
        raise DataError(f"{run}: the images have changed since the run; train again")
    return tuple(wrong for _, wrong in _rank_labels(logits_NC.double().numpy(), images))


def _rank_labels(logits_NC: NDArray[np.float64], images: LabeledImages) -> list[tuple[int, WrongLabel]]:
    """List the images of which another class is more probable than the label, and what they show.

    The image with the least probable label is first ("self-confidence" in Northcutt et al., JAIR 2021).
    """
    probabilities_NC, suggested_N = softmax(logits_NC), logits_NC.argmax(axis=1)
    labels = images.targets.astype(np.int64)
    of_label_N = probabilities_NC[np.arange(len(labels)), labels]
    return [
        (
            index,
            WrongLabel(
                file=images.describe(index),
                label=images.labels[labels[index]],
                suggested=images.labels[suggested_N[index]],
                probability=float(of_label_N[index]),
                probability_suggested=float(probabilities_NC[index, suggested_N[index]]),
            ),
        )
        for index in np.argsort(of_label_N, kind="stable").tolist()
        if suggested_N[index] != labels[index]
    ]


def _training_galleries(
    images: LabeledImages, state: dict[str, Tensor], preprocess: Preprocess
) -> dict[str, Any]:
    """Show the training *images* with probably wrong labels, and the largest groups of copies."""
    if "groups" not in state or len(images) != len(state["groups"]):
        return {}
    wrong = []
    if "label_logits" in state:
        for index, one in _rank_labels(state["label_logits"].double().numpy(), images)[:_MAX_MISTAKES]:
            shares = map(percent, (one.probability, one.probability_suggested))
            caption = f"{one.label} ({next(shares)}), suggested: {one.suggested} ({next(shares)})"
            wrong.append(_picture(images, index, caption, preprocess))
    group_N = state["groups"].numpy()
    sizes = np.bincount(group_N)
    groups = []
    for group in np.argsort(-sizes, kind="stable")[: min(_MAX_GROUPS, int((sizes > 1).sum()))]:
        members = np.flatnonzero(group_N == group)[:_MAX_COPIES].tolist()
        captions = (", ".join(images.class_names(index)) for index in members)
        groups.append(
            tuple(_picture(images, *shown, preprocess) for shown in zip(members, captions, strict=True))
        )
    return {"wrong_labels": tuple(wrong), "groups": tuple(groups)}


def _procedure_state(last: Checkpoint) -> dict[str, Tensor]:
    """Return the tensors that the procedure of a run stored in its *last* checkpoint."""
    state: dict[str, Tensor] = (last.resume or {}).get("procedure", {})
    return state


def _picture(images: LabeledImages, index: int, caption: str, preprocess: Preprocess) -> Mistake:
    """Show an image in a small JPEG with *caption*."""
    small = to_rgb(images[index][0], preprocess).copy()  # without metadata such as time and place
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    encoded = io.BytesIO()
    small.save(encoded, "JPEG", quality=JPEG_QUALITY)
    jpeg = base64.b64encode(encoded.getvalue()).decode("ascii")
    return Mistake(file=images.identity(index), caption=caption, jpeg=jpeg)


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


def worst_mistakes(
    scores: Sequence[ImageScore], images: LabeledImages, preprocess: Preprocess
) -> list[Mistake]:
    """Select the wrong predictions with the highest confidence."""
    wrong = [(-score.confidence, index) for index, score in enumerate(scores) if not score.correct]
    mistakes = []
    for _, index in sorted(wrong)[:_MAX_MISTAKES]:
        score = scores[index]
        true, predicted = images.labels[score.target], images.labels[score.top5[0]]
        caption = (
            f"{true} ({percent(score.likelihood)}), predicted as {predicted} ({percent(score.confidence)})"
        )
        mistakes.append(_picture(images, index, caption, preprocess))
    return mistakes
