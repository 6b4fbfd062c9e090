"""Photographs on a page: the worst mistakes, probably wrong labels, and copies of one photograph."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from sopdeploy.data.base import LabeledImages
from sopdeploy.evaluation.metrics import ImageScore
from sopdeploy.html.report import Figure, percent
from sopdeploy.images.pixels import to_rgb
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.report.wrong_labels import list_wrong_labels

_MAX_SHOWN, _MAX_GROUPS, _MAX_COPIES = 24, 12, 4  # images, groups, and images of a group
_SIDE = 128  # pixels of the longer side
_JPEG_QUALITY = 75


def show_mistakes(
    scores: Sequence[ImageScore], images: LabeledImages, preprocess: Preprocess
) -> list[Figure]:
    """Show the wrong predictions with the highest confidence."""
    wrong = sorted((-score.confidence, index) for index, score in enumerate(scores) if not score.correct)
    figures = []
    for _, index in wrong[:_MAX_SHOWN]:
        score = scores[index]
        true, predicted = images.labels[score.target], images.labels[score.top5[0]]
        shares = percent(score.likelihood), percent(score.confidence)
        caption = f"{true} ({shares[0]}), predicted as {predicted} ({shares[1]})"
        figures.append(_show(images, index, caption, preprocess))
    return figures


def show_wrong_labels(
    images: LabeledImages, state: dict[str, Tensor], preprocess: Preprocess
) -> list[Figure]:
    """Show the training *images* whose label is probably wrong by the *state* of a procedure."""
    if "label_logits" not in state:
        return []
    figures = []
    for index, found in list_wrong_labels(state["label_logits"].double().numpy(), images)[:_MAX_SHOWN]:
        shares = percent(found.probability), percent(found.probability_suggested)
        caption = f"{found.label} ({shares[0]}), suggested: {found.suggested} ({shares[1]})"
        figures.append(_show(images, index, caption, preprocess))
    return figures


def show_copies(images: LabeledImages, state: dict[str, Tensor], preprocess: Preprocess) -> list[Figure]:
    """Show the largest groups of copies among the training *images* by the *state* of a procedure."""
    if "groups" not in state:
        return []
    group_N = state["groups"].numpy()
    sizes = np.bincount(group_N)
    figures = []
    for number, group in enumerate(np.argsort(-sizes, kind="stable")[:_MAX_GROUPS], 1):
        if sizes[group] > 1:
            for index in np.flatnonzero(group_N == group)[:_MAX_COPIES].tolist():
                caption = f"group {number}: {', '.join(images.class_names(index))}"
                figures.append(_show(images, index, caption, preprocess))
    return figures


def _show(images: LabeledImages, index: int, caption: str, preprocess: Preprocess) -> Figure:
    """Show an image as a small JPEG with its file, if it is one, and *caption*."""
    small = to_rgb(images[index][0], preprocess).copy()  # without metadata such as time and place
    small.thumbnail((_SIDE, _SIDE))
    encoded = io.BytesIO()
    small.save(encoded, "JPEG", quality=_JPEG_QUALITY)
    jpeg = base64.b64encode(encoded.getvalue()).decode("ascii")
    return Figure(image=f"data:image/jpeg;base64,{jpeg}", caption=f"{images.identity(index)}: {caption}")
