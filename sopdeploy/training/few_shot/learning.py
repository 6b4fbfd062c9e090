"""What more photographs of a class would give: classes of the folder are reduced, and found less often.

Letters: N images, K classes.
"""

import numpy as np
from numpy.typing import NDArray

from sopdeploy.training.few_shot.classifier import MAX_RANK, LinearProblem
from sopdeploy.training.few_shot.discriminant import Moments
from sopdeploy.training.few_shot.scaling import ENOUGH, Scaling
from sopdeploy.training.few_shot.targets import Indices
from sopdeploy.training.records.results import Gain

MIN_JUDGED = 20  # photographs; a share of fewer says little
MAX_REDUCED = 20  # classes, at random
PRIOR = 4  # photographs of average classes that judge a class, too
# Smallest gain of a class of `ENOUGH` photographs, and number of them
CLEAR = 0.03
MAX_GAINS = 3


def found_when_reduced(
    problem: LinearProblem, excess: float, number: int, margin: float
) -> NDArray[np.bool_]:
    """Tell which photographs are found if their class has only *number* others; other classes keep all.

    Those that it keeps are drawn, because the first files may be of other days or shops than the
    last. One class after the other is reduced, at most `MAX_REDUCED`, and gets this *margin*;
    *excess* is that of `Scaling`. One photograph of each group is judged. Returns all judged
    photographs (n,) in one array.
    """
    random = np.random.default_rng(number)
    labels_N = problem.targets.strata
    groups_N = np.arange(len(labels_N)) if problem.groups is None else problem.groups

    # The sums over all photographs, from which those of one class are taken out: this is cheaper
    # than adding up all others for each class.
    total = problem.moments(np.ones(len(labels_N), np.bool_))

    found_K = [np.zeros(0, np.bool_)]
    for label in random.permutation(problem.targets.classes.shape[1])[:MAX_REDUCED].tolist():
        # One photograph of each group of the class, drawn at random, in random order: the first ones
        # are kept, the others judged.
        of_class = random.permutation(np.flatnonzero(labels_N == label))
        different = of_class[np.unique(groups_N[of_class], return_index=True)[1]]
        different = random.permutation(different)
        kept = different[:number]
        judged = different[number:]

        if len(kept) == number and len(judged):
            is_kept_N = np.zeros(len(labels_N), np.bool_)
            is_kept_N[kept] = True
            others = total.without(problem.moments(labels_N == label))
            fitted = Moments.sum([others, problem.moments(is_kept_N)])
            head = fitted.discriminate("softmax")
            scores = problem.reduced[judged] @ head.weight.T + head.bias(excess)
            scores[:, label] -= margin
            found_K.append(scores.argmax(axis=1) == label)
    return np.concatenate(found_K)


def _shares_found(
    problem: LinearProblem, scaling: Scaling, numbers: set[int], independent_K: Indices
) -> dict[int, float]:
    """Return the share of photographs that are found if their class has only each of the *numbers*.

    The class then has the mean margin of the classes that have this number of independent
    photographs (`independent_K`). Shares of fewer than `MIN_JUDGED` photographs are left out.
    """
    margins_K = np.broadcast_to(scaling.margins, independent_K.shape)
    shares = {}
    for number in numbers:
        margin = np.mean(margins_K[independent_K == number]) if number in independent_K else 0.0
        is_found = found_when_reduced(problem, scaling.excess, number, float(margin))
        if len(is_found) >= MIN_JUDGED:
            shares[number] = float(is_found.mean())
    return shares


def estimate_gains(
    problem: LinearProblem,
    scaling: Scaling,
    judged: Indices,
    right: NDArray[np.bool_],
    labels: tuple[str, ...],
) -> tuple[Gain, ...]:
    """Estimate how often a class would be found with more photographs.

    The estimates are those of classes with few photographs, if these would be found more often, and
    of the `MAX_GAINS` others that gain most.

    - A class with fewer than `ENOUGH` photographs is found as often as other classes are if they
      have as few. With `ENOUGH`, it would be found as often as they are with `ENOUGH`.
    - In any other class, twice as many photographs would reduce the errors by the same factor as
      all photographs do on average, compared with half the median number of a class.

    Photographs of one group count as one. *right* tells which of the *judged* images are
    classified correctly by a head without them. Nothing is estimated for more than `MAX_RANK`
    images, or with several classes per image.
    """
    classes_NK = problem.targets.classes
    if len(classes_NK) > MAX_RANK or problem.targets.activation != "softmax" or not len(judged):
        return ()

    # Photographs of each class: all, and those that show different things.
    photographs_K = classes_NK.sum(axis=0).astype(int)
    independent_K = np.rint(problem.shares() @ classes_NK).astype(np.intp)

    # How many are found if each class has only some.
    half = max(1, int(np.median(independent_K)) // 2)
    few_K = (independent_K > 0) & (independent_K < ENOUGH)
    numbers = {half, ENOUGH, *independent_K[few_K].tolist()}
    share_found = _shares_found(problem, scaling, numbers, independent_K)

    # The errors of a class, and what remains of them with twice as many photographs.
    judged_K = classes_NK[judged].sum(axis=0)
    errors_K = classes_NK[judged][~right].sum(axis=0)
    mean_error = float((~right).mean())
    error_K = (errors_K + PRIOR * mean_error) / (judged_K + PRIOR)
    remaining = min(1.0, mean_error / max(1e-9, 1 - share_found.get(half, 1.0)))

    # A class with few photographs is found as the others are with `ENOUGH`; another one has
    # fewer errors.
    few = []
    others = []
    enough_found = share_found.get(ENOUGH, 0.0)
    for label, name in enumerate(labels):
        number = int(independent_K[label])
        counts = {"label": name, "count": number, "photographs": int(photographs_K[label])}
        if 0 < number < ENOUGH and share_found.get(number, 1.0) < enough_found:
            found = share_found[number]
            few.append(Gain(**counts, found=found, more=ENOUGH, then=enough_found))
        elif number >= ENOUGH:
            error = float(error_K[label])
            then = 1 - error * remaining
            others.append(Gain(**counts, found=1 - error, more=2 * number, then=then))

    others = [gain for gain in others if gain.then - gain.found >= CLEAR]
    others.sort(key=lambda gain: gain.found - gain.then)
    return (*few, *others[:MAX_GAINS])
