"""Taking the second-order branches off in the middle of a run, an ablation (`model.remove_branches_at`).

The network is built anew without branches; weights, the optimizer's state and the averaged weights of what
stays go over by name. From then on it is another network of the catalog, and checkpoints say so.
"""

from typing import Any

from torch import Tensor

from sopdeploy.models.base import Classifier
from sopdeploy.models.dsop import DSoP
from sopdeploy.models.registry import create_model
from sopdeploy.training.run import Run


def remove_branches_if_due(run: Run) -> None:
    """Take the branches off from the start of the recipe's epoch on; without them there is nothing to do."""
    due = run.recipe.model.remove_branches_at
    if due is not None and run.at.epoch >= due and isinstance(run.model, DSoP) and run.model.taps:
        remove_branches(run, run.model)


def remove_branches(run: Run, model: DSoP) -> None:
    """Replace the network of *run* by the one without branches."""
    config = without_branches(run.config, len(model.tap_stages()))
    lean = create_model(run.recipe.model.name, num_classes=len(run.labels), **config)
    state = model.state_dict()
    lean.load_state_dict({name: state[name] for name in lean.state_dict()})
    adopt(run, lean, config)


def without_branches(config: dict[str, Any], stages: int) -> dict[str, Any]:
    """Return the switches of the same network with no block in any branch."""
    return {**config, "aux_blocks": [0] * stages, "keep_unused_branches": False}


def adopt(run: Run, model: Classifier, config: dict[str, Any]) -> None:
    """Make *model* the network of *run*, with the state of the optimizer that belongs to it."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in run.model.named_parameters()}
    states = {names[parameter]: state for parameter, state in run.optimizer.state.items()}
    run.place(model, config)
    for name, parameter in run.model.named_parameters():
        if name in states:
            run.optimizer.state[parameter] = states[name]
    if run.average is not None:
        run.average.keep_only(run.model)
