"""Which labels of images are probably wrong, by out-of-fold predictions."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.decision import softmax

# A label is listed if another class is so many times as probable, both relative to the average
# probability of the class for its own images. Labels that are contradicted less are mostly
# right.
LISTED_RATIO = 20
# Of the images whose label is not the most probable class, so many have a label that would be
# listed although it is right. Seven sets decided both numbers; on two others, more of what is
# listed is wrong, too.
LISTED_BY_CHANCE = 0.1
# None is listed if chance lists as many of as many errors in more of the folders than this. Two
# of two are listed.
CHANCE_LEVEL = LISTED_BY_CHANCE**2
# Below this share of images that are classified as their label says, wrong labels often look like
# errors of the classifier: of 88 wrong ones in two such folders, none was listed, in a third one 12.
JUDGED = 0.8
# There, so many labels are shown as suspects, the most contradicted ones.
SUSPECTED = 0.05


class LabelDoubts(NamedTuple):
    """Which labels (N,) are `listed`, the classes `suggested` (N,), and all `probabilities` (N, C).

    The `support` (N,) of a label is its probability divided by the largest one of a class, both
    relative to the averages of the classes. `agreement` is the share of the labels that no class
    contradicts: the probabilities themselves favour classes of few images, which have no margin here.
    """

    listed: NDArray[np.bool_]
    suggested: NDArray[np.intp]
    probabilities: NDArray[np.float64]
    support: NDArray[np.float64]
    agreement: float


def find_label_doubts(
    logits_NC: NDArray[np.float64],
    labels: NDArray[np.int64],
    copies_N: NDArray[np.int64] | None = None,
) -> LabelDoubts:
    """Find which *labels* (N,) of images their out-of-fold *logits_NC* contradict.

    Each class has an average probability for the images with its label, which is low for
    similar classes. All probabilities are divided by these averages. A label is listed if then
    the probability of another class is more than `LISTED_RATIO` times its own ("confident
    learning", Northcutt et al., JAIR 2021). No label is listed if chance, which lists
    `LISTED_BY_CHANCE` of the errors, explains their number (binomial test). Images with equal
    *copies_N* show one photograph, and count once there; without it, each shows one of its own.
    """
    from scipy.special import bdtrc  # noqa: PLC0415 # SciPy takes a quarter of a second

    # What the classifier says of each label.
    probabilities_NC = softmax(logits_NC)

    # Classes differ in how sure a network is of them: probabilities are relative to the average
    # of the class.
    of_label_N = probabilities_NC[np.arange(len(labels)), labels]
    sums_C = np.bincount(labels, of_label_N, minlength=probabilities_NC.shape[1])
    # The average of a class without images is 0.
    average_C = sums_C / np.maximum(np.bincount(labels, minlength=len(sums_C)), 1)

    # A class of few images whose labels are all wrong has an average near 0.
    floor = of_label_N.mean() / 2
    relative_NC = probabilities_NC / np.maximum(average_C, floor)
    relative_of_label_N = relative_NC[np.arange(len(labels)), labels]

    is_listed_N = relative_NC.max(axis=1) > LISTED_RATIO * relative_of_label_N

    # Whether right labels explain the list: copies are wrong together.
    photograph_N = np.arange(len(labels)) if copies_N is None else copies_N
    is_error_N = relative_of_label_N < relative_NC.max(axis=1)
    num_errors = len(np.unique(photograph_N[is_error_N]))
    num_listed = len(np.unique(photograph_N[is_listed_N]))
    if num_listed and bdtrc(num_listed - 1, num_errors, LISTED_BY_CHANCE) > CHANCE_LEVEL:
        is_listed_N[:] = False
    suggested_N = relative_NC.argmax(axis=1)
    return LabelDoubts(
        listed=is_listed_N,
        suggested=suggested_N,
        probabilities=probabilities_NC,
        support=relative_of_label_N / relative_NC.max(axis=1),
        agreement=float((suggested_N == labels).mean()),
    )


def find_suspects(doubts: LabelDoubts) -> NDArray[np.intp]:
    """Return the indices of the most contradicted labels, the worst first, where none can be judged.

    These are `SUSPECTED` of all, if *doubts* lists none and the classifier agrees with less than
    `JUDGED` of the labels.
    """
    if doubts.listed.any() or doubts.agreement >= JUDGED:
        return np.zeros(0, np.intp)
    num_suspects = math.ceil(SUSPECTED * len(doubts.support))
    return np.argsort(doubts.support, kind="stable")[:num_suspects]


def describe_unjudged(doubts: LabelDoubts) -> str:
    """Say that wrong labels may remain unseen if none can be judged (`find_suspects`); or ""."""
    suspects = find_suspects(doubts)
    if not len(suspects):
        return ""
    return (
        f"wrong labels may remain unseen: the classifier agrees with {100 * doubts.agreement:.0f} % of the labels, "
        f"and below {100 * JUDGED:.0f} % most wrong ones look like its own errors; `sopdeploy train "
        f"--data FOLDER --dry-run --wrong-labels RUN` lists the {len(suspects)} labels that it contradicts most"
    )
