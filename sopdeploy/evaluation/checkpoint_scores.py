"""Evaluate a checkpoint on a folder of images, and fit its decision to them.

Letters: N images, C classes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pydantic
import torch

from sopdeploy.base.project import AS_IT_IS, FolderReading
from sopdeploy.bundle.decision import Decision
from sopdeploy.data.folders.evaluation_images import open_evaluation_images
from sopdeploy.data.photos.file_checks import describe_seen
from sopdeploy.data.photos.files import Log
from sopdeploy.evaluation.decision_fit import check_are_enough, fit_to_images
from sopdeploy.evaluation.prediction import as_evaluated, score_images
from sopdeploy.evaluation.predictions import Predictions, make_predictions
from sopdeploy.weights.checkpoint import Checkpoint, build_classifier, read_checkpoint


class CheckpointScores(NamedTuple):
    """The predictions of a checkpoint with the `labels` they refer to, and the fitted decision, if any."""

    checkpoint: Checkpoint
    labels: tuple[str, ...]
    predictions: Predictions
    decision: Decision | None


def score_checkpoint(
    path: Path,
    data: Path,
    *,
    accepts: float | None = None,
    workers: int = 0,
    mirror: bool = False,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
    log: Log = lambda _line: None,
) -> CheckpointScores:
    """Predict the images below *data*, one subfolder per class or `labels.csv`, by the checkpoint at *path*.

    With *accepts*, a decision that accepts this fraction of known images is fitted, too; with
    several classes per image, thresholds are fitted instead, for any fraction. With *mirror*,
    the logits are means over an image and its mirror image. *on_image* receives the numbers of
    images done and in total, *log* lines about the folder, also about images that the network
    was trained on. With one class per image, the decision is fitted to the first image of each
    group, which shows one object. Raises `DataError` for too few images to fit to.
    """
    checkpoint = read_checkpoint(path)
    is_multi_label = checkpoint.decision is not None and checkpoint.decision.is_multi_label
    # With several classes per image, targets have a column for each output, like the
    # thresholds. Otherwise they are indices of the sorted classes, to which `make_predictions`
    # converts the outputs.
    labels = checkpoint.labels if is_multi_label else tuple(sorted(checkpoint.labels))

    images = open_evaluation_images(
        data,
        labels,
        multi_label=is_multi_label,
        reading=_how_images_were_read(checkpoint),
        log=log,
    )

    if accepts is not None and not is_multi_label:
        check_are_enough(images)
    if warning := describe_seen(images, checkpoint.image_hashes.numpy()):
        log(f"{data}: {warning}")

    model = build_classifier(checkpoint, path).to(
        "cuda" if torch.cuda.is_available() else "cpu"
    )

    # The logits of all photographs in one pass.
    network = as_evaluated(model, mirror=mirror)
    logits_NC = score_images(
        network, checkpoint.preprocess, images, workers=workers, on_image=on_image
    )

    decision = Decision() if checkpoint.decision is None else checkpoint.decision
    predictions = make_predictions(
        logits_NC, images, checkpoint.labels, decision.for_trained_logits()
    )

    # A decision for these photographs, if one is asked for.
    fitted = None
    if accepts is not None:
        fitted = fit_to_images(
            logits_NC,
            images,
            checkpoint.labels,
            accepts=accepts,
            is_multi_label=is_multi_label,
            scalable=model.has_scalable_logits(),
        )
    return CheckpointScores(checkpoint, images.labels, predictions, fitted)


def _how_images_were_read(checkpoint: Checkpoint) -> FolderReading:
    """Return how the folder of the training images was read, before 0.3.0 as far as the recipe says."""
    if checkpoint.origin is not None and checkpoint.origin.reading != AS_IT_IS:
        return checkpoint.origin.reading

    # A file can contain anything, also what no reading may say.
    recipe = checkpoint.training.get("recipe")
    of_data = recipe.get("data") if isinstance(recipe, dict) else None
    of_data = of_data if isinstance(of_data, dict) else {}
    try:
        return FolderReading(
            classes_from=str(of_data.get("classes_from", "")),
            leave_out=str(of_data.get("leave_out", "")),
        )
    except pydantic.ValidationError:
        return AS_IT_IS
