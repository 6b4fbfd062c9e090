"""The procedure that replaces the training loop for few images. It is optional.

The recipe table `few_shot` configures it, and its record has the same name in results and checkpoints.
Without a procedure, the table has no effect and the training loop trains on any number of images.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from sopdeploy.data.base import Split
from sopdeploy.data.datasets.folder import FolderConfig
from sopdeploy.data.near import keep_groups_together
from sopdeploy.decision import Decision

if TYPE_CHECKING:
    from sopdeploy.training.callbacks import Callback
    from sopdeploy.training.recipe import Recipe
    from sopdeploy.training.run import Run
    from sopdeploy.training.run_folder import RunFolder

PROCEDURES: tuple[str, ...] = (
    "sopdeploy.training.few_shot",
)  # at most one  # fmt: skip


def _load(module: str) -> Any:
    """Import *module* of the procedure."""
    return import_module(f"{PROCEDURES[0]}.{module}")


if TYPE_CHECKING:
    ProcedureTable = Any
else:
    ProcedureTable = (_load("config").FewShotConfig if PROCEDURES else dict) | None


class Selection(NamedTuple):
    """The images to train on, whether the procedure replaces the training loop for them, and why."""

    data: Split
    few_shot: bool
    reason: str = ""


def select_procedure(recipe: "Recipe", data: Split, record: Mapping[str, Any] | None = None) -> Selection:
    """Select the procedure or the training loop, for a resumed run as its *record* says.

    For the loop, near-duplicates of training images are not held out.
    """
    selection = Selection(data, False)
    if PROCEDURES:
        selection = _load("selection").select_procedure(recipe, data, record)
    if not selection.few_shot and isinstance(recipe.data, FolderConfig):
        data = keep_groups_together(selection.data, recipe.data.hold_out, recipe.data.hold_out_seed)
        return selection._replace(data=data)
    return selection


def run_procedure(run: "Run", data: Split, folder: "RunFolder", callback: "Callback") -> Decision | None:
    """Train *run* on *data*; returns the decision of its `best.pt`."""
    decision: Decision | None = _load("run").train_few_shot(run, data, folder, callback)
    return decision


def read_record(training: Mapping[str, Any]) -> Any:
    """Read the record of the procedure from the record of a training; None if the training loop ran."""
    if not PROCEDURES or "few_shot" not in training:
        return None
    return _load("config").FewShotResult.model_validate(training["few_shot"])
