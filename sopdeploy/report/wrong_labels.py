"""Find training images whose label is probably wrong, by the out-of-fold predictions of a run.

Letters: N images, C classes.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sopdeploy.base.config import Fraction, StrictModel
from sopdeploy.base.files import LAST
from sopdeploy.data.photos.file_checks import hash_images
from sopdeploy.data.photos.photo import LabeledImages
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.evaluation.label_doubts import find_label_doubts, find_suspects
from sopdeploy.paths import describe_wrong
from sopdeploy.training.division import open_division
from sopdeploy.training.few_shot.state import read_copies, read_label_logits
from sopdeploy.training.records.checkpoints import has_same_images, read_recorded_recipe
from sopdeploy.weights.checkpoint import read_checkpoint


class WrongLabel(StrictModel):
    """An image whose label the others contradict: the more probable class, and both probabilities.

    The probabilities are those of a classifier that was fitted without the image and its
    copies. `is_suspect` tells that labels cannot be judged (`find_suspects`).
    """

    file: str
    label: str
    suggested: str
    probability: Fraction
    probability_suggested: Fraction
    is_suspect: bool = False


def find_wrong_labels(run: Path, data: Path | None = None) -> tuple[WrongLabel, ...]:
    """Find the training images of the run in the folder *run* whose label is probably wrong, the worst first.

    If labels cannot be judged, these are the most contradicted ones (`find_suspects`).

    *data* is the folder of the images, by default that of the recipe. Raises `ConfigError` for
    a run without out-of-fold predictions, `DataError` if images or labels have changed since.
    """
    path = run / LAST
    if not path.is_file():
        raise ConfigError(f"{run}: {describe_wrong(run, 'run')}")

    last = read_checkpoint(path)
    logits = read_label_logits(last)
    if logits is None:
        raise ConfigError(
            f"{run}: has no out-of-fold predictions of files with one class each; give a run of the few-shot "
            "procedure on such files"
        )

    # The same images, if the folder was moved, are at *data*.
    recipe = read_recorded_recipe(last, path)
    if data is not None:
        if "path" not in type(recipe.data).model_fields:
            raise ConfigError(f"{run}: was trained on {recipe.data.kind}, not on a folder")
        recipe = recipe.model_copy(
            update={"data": recipe.data.model_copy(update={"path": data})}
        )

    # The predictions are in the order of the images, which must be the same.
    division = open_division(recipe, last, path)
    images = division.data.train
    hashes = division.file_hashes
    if not len(hashes):  # fine-tuning of more than `MAX_HASHED` images
        hashes = hash_images(images)
    if images.labels != last.labels or not has_same_images(last, path, images, hashes):
        raise DataError(f"{run}: the images have changed since the run; train again")

    doubts = list_wrong_labels(logits, images, read_copies(last), with_suspects=True)
    return tuple(wrong for _, wrong in doubts)


def list_wrong_labels(
    logits_NC: NDArray[np.float64],
    images: LabeledImages,
    copies_N: NDArray[np.int64] | None = None,
    *,
    with_suspects: bool = False,
) -> list[tuple[int, WrongLabel]]:
    """List (index, description) of the images of `find_label_doubts`, the least probable label first.

    With *with_suspects*, those of `find_suspects` if there are none, the most contradicted first.
    """
    labels = images.targets.astype(np.int64)
    found = find_label_doubts(logits_NC, labels, copies_N)
    probabilities_NC = found.probabilities
    of_label_N = probabilities_NC[np.arange(len(labels)), labels]
    order = np.argsort(of_label_N, kind="stable")
    indices = order[found.listed[order]]
    has_suspects = with_suspects and not len(indices)
    if has_suspects:
        indices = find_suspects(found)

    doubts = []
    for index in indices.tolist():
        label = labels[index]
        suggested = found.suggested[index]
        wrong = WrongLabel(
            file=images.describe(index),
            label=images.labels[label],
            suggested=images.labels[suggested],
            probability=float(of_label_N[index]),
            probability_suggested=float(probabilities_NC[index, suggested]),
            is_suspect=has_suspects,
        )
        doubts.append((index, wrong))
    return doubts
