"""The verdict of `promote`, by its own functions, of answers instead of bundles."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sopdeploy.errors import shorten
from sopdeploy.evaluation.permission import TOLERANCE
from sopdeploy_commands.promotion.compare import _bound_losses as bound_losses
from sopdeploy_commands.promotion.compare import _decide as decide_by
from sopdeploy_commands.promotion.compare import compare_classes
from sopdeploy_commands.promotion.comparison import count_needed, list_worse
from sopdeploy_commands.promotion.photographs import Photographs

Array = NDArray[Any]


class Verdict(NamedTuple):
    """Whether a bundle is promoted, the labels to add if it is not, and what `promote` prints.

    `worse` are classes in which it is worse.
    """

    passes: bool
    num_labels: int | None
    text: str
    worse: list[str]


def decide(
    right: Sequence[Array],
    targets: Array,
    is_old: Array,
    labels: Sequence[str],
    *,
    attempt: int = 1,
) -> Verdict:
    """Decide by N photographs of the classes *targets*, indices of *labels*.

    *right* tells (N,) of the live bundle and of the new one which photographs it is right on;
    *is_old* (N,) which show a class of the live one.
    """
    counted = np.ones(len(targets), np.bool_)
    live_right, new_right = right
    images: Any = SimpleNamespace(targets=targets, labels=labels)
    photographs = Photographs(
        images, counted, is_old, ~is_old, is_old, np.zeros(len(targets)), changed_at=None
    )
    live: Any = SimpleNamespace(right=live_right)
    new: Any = SimpleNamespace(right=new_right)
    checks = bound_losses(photographs, live, new, TOLERANCE, attempt)
    verdict = decide_by(checks, None)

    # As `promote` refuses: the checks, then classes.
    problems = [check.problem for check in checks if not check.passes]
    classes = compare_classes(photographs, is_old, live_right, new_right)
    worse = list_worse(classes, TOLERANCE)
    if worse:
        problems.append(f"worse in {shorten(worse)}")
    if not problems:
        return Verdict(True, None, f"passes: {checks[0].figures}", [])

    needed = count_needed(checks) if verdict == "undecided" else None
    if needed is not None:
        problems.append(needed.line)
    parts = [*([] if verdict in {"better", "not worse"} else [verdict]), *problems]
    text = f"{'; '.join(parts)}: {checks[0].figures}"
    return Verdict(False, needed.num_labels if needed else None, text, worse)
