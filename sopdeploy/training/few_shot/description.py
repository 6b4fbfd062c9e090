"""What a finished run tells: its score, the images of each class, and what its predictions show about them.

Letters: N images, K classes.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sopdeploy.data.photos.copies import number_classes
from sopdeploy.data.photos.photo import LabeledImages
from sopdeploy.evaluation.metrics import Rate, count_confusion
from sopdeploy.evaluation.multi_label import MeanPrecision
from sopdeploy.training.few_shot.cross_validation import (
    CrossValidation,
    select_typical,
)
from sopdeploy.training.few_shot.learning import estimate_gains
from sopdeploy.training.few_shot.targets import Array, Indices, count_groups
from sopdeploy.training.records.checkpoints import Setup
from sopdeploy.training.records.results import FewShotResult

MAX_COPIES = 10  # of a photograph with different labels, all of which are named
# Share and number of the images of a class that chance takes for another one
CHANCE = 0.4
MIN_CONFUSED = 3
# ratio of the largest class to the smallest from which on the result says how it is corrected
UNEVEN = 1.5


def describe_run(
    setup: Setup,
    validation: CrossValidation,
    score: Rate | MeanPrecision | None,
    is_doubted_N: NDArray[np.bool_],
    label_logits: Array | None,
) -> FewShotResult:
    """Describe the training images, their groups and copies, the classifier and its *score*.

    *is_doubted_N* (N,) tells which labels `find_label_doubts` lists, by *label_logits* (N, K).
    """
    images = setup.data.train
    targets = validation.problem.targets

    # The images of each class: all, those that the score counts, and their groups.
    classes_NK = targets.classes
    counts = dict(zip(images.labels, classes_NK.sum(axis=0).astype(int).tolist(), strict=True))
    judged_K = classes_NK[validation.judged].sum(axis=0).astype(int)
    if len(setup.data.held_out):
        judged_K = setup.data.held_out.class_counts()
    num_groups_K = count_groups(classes_NK, validation.groups)
    num_groups = dict(zip(images.labels, num_groups_K.tolist(), strict=True))

    # The smallest class may have no images, and counts as one.
    has_one_class = targets.activation == "softmax"
    smallest = max(1, min(counts.values()))
    is_uneven = has_one_class and max(counts.values()) > UNEVEN * smallest

    # What the images that count tell about the classes.
    right = (
        validation.logits[validation.judged].argmax(axis=1) == targets.strata[validation.judged]
    )
    gains = estimate_gains(
        validation.problem, validation.scaling, validation.judged, right, images.labels
    )
    diffuse = validation.problem.diffuse_classes().tolist() if has_one_class else []

    # Only cross-validation has classifiers that did not learn the doubted labels.
    without_doubted = None
    if label_logits is not None and not len(setup.data.held_out):
        without_doubted = _score_without_doubted(validation, is_doubted_N, label_logits)

    # What the classifier reads.
    head = validation.features.head
    taps = f" of {', '.join(head.taps)}" if head.taps else ""

    return FewShotResult(
        top1=score if isinstance(score, Rate) else None,
        map=score if isinstance(score, MeanPrecision) else None,
        estimated_on="held-out" if len(setup.data.held_out) else "cross-validation",
        class_counts=counts,
        judged_counts=dict(zip(images.labels, judged_K.tolist(), strict=True)),
        is_uneven=is_uneven,
        num_images=len(images),
        left_out=tuple(map(str, setup.data.left_out)),
        # Photographs that a server kept; they do not count as typical.
        num_selected=int((~select_typical(images)).sum()),
        num_doubted=int(is_doubted_N.sum()),
        without_doubted=without_doubted,
        gains=gains,
        num_duplicates=len(images) - len(set(validation.features.hashes)),
        num_groups=int(validation.groups.max()) + 1,
        num_photographs=int(validation.copies.max()) + 1,
        one_group=tuple(label for label, number in num_groups.items() if number == 1),
        two_groups=tuple(
            label for label, number in num_groups.items() if number == 2 and counts[label] > 2
        ),
        contradictions=tuple(_find_contradictions(images, validation.copies)),
        alike=validation.alike,
        confused=_find_confused(validation, images.labels) if has_one_class else (),
        diffuse=tuple(images.labels[label] for label in diffuse),
        clip=tuple(map(images.identity, validation.clips.certain or ())),
        possible_clip=tuple(map(images.identity, validation.clips.doubtful or ())),
        clip_pattern=validation.clips.pattern,
        head=f"{setup.recipe.model.name} {head.kind}{taps}",
        num_features=len(validation.problem.space.center),
        temperature=validation.scaling.temperature,
        seconds=validation.seconds,
    )


def _find_contradictions(images: LabeledImages, copies_N: Indices) -> Iterator[str]:
    """Name the copies of each photograph that have different labels; *copies_N* tells what images show."""
    labels_N = number_classes(images.targets)
    for photograph in np.flatnonzero(np.bincount(copies_N) > 1):
        indices = np.flatnonzero(copies_N == photograph)
        first_of_labels = np.unique(labels_N[indices], return_index=True)[1]
        if len(first_of_labels) > 1:
            # Of many copies, such as the frames of a clip, one image of each class is named.
            if len(indices) > MAX_COPIES:
                indices = indices[np.sort(first_of_labels)]
            yield " = ".join(map(images.identity, indices.tolist()))


def _score_without_doubted(
    validation: CrossValidation, is_doubted_N: NDArray[np.bool_], label_logits: Array
) -> tuple[float, float] | None:
    """Compute two accuracies on the judged images whose labels are not doubted, the lower one first.

    One accuracy is of the classifiers that were fitted to the doubted labels, too, as the network
    is. The other one is of the classifiers of *label_logits*, which were not fitted to them. None
    if no label is doubted, or all are.
    """
    kept = validation.judged[~is_doubted_N[validation.judged]]
    if not is_doubted_N.any() or not len(kept):
        return None
    labels = validation.problem.targets.strata[kept]
    with_them = float((validation.logits[kept].argmax(axis=1) == labels).mean())

    # Labels are judged without margins, which belong to the classifier.
    scaling = validation.scaling
    logits_NK = label_logits - scaling.margins / scaling.temperature
    without_them = float((logits_NK[kept].argmax(axis=1) == labels).mean())
    return min(with_them, without_them), max(with_them, without_them)


def _find_confused(
    validation: CrossValidation, labels: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    """Find the pairs of classes that the network tells apart hardly better than by chance.

    Only the images of the two classes that are predicted as one of them count. In each class, at
    least the share `CHANCE` of these images, and at least `MIN_CONFUSED`, are predicted as the
    other class.
    """
    classes = validation.problem.targets.strata[validation.judged]
    predicted = validation.logits[validation.judged].argmax(axis=1)
    counts_KK = count_confusion(classes, predicted, len(labels))

    # The images of a class that are predicted as this class or as the other one.
    of_both_KK = counts_KK + np.diagonal(counts_KK)[:, None]
    is_by_chance_KK = counts_KK >= np.maximum(CHANCE * of_both_KK, MIN_CONFUSED)
    pairs = np.argwhere(np.triu(is_by_chance_KK & is_by_chance_KK.T, 1))
    return tuple((labels[one], labels[other]) for one, other in pairs.tolist())
