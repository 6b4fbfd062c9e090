"""The interface of a procedure, and the selection of the one that trains on some images."""

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import pydantic

from sopdeploy.data.base import Split
from sopdeploy.errors import ConfigError
from sopdeploy.training.callbacks import Callback
from sopdeploy.training.loop_config import LoopConfig
from sopdeploy.training.procedure_config import AutoConfig, ProcedureConfig, ProcedureResult
from sopdeploy.training.recipe import PROCEDURES, Recipe
from sopdeploy.training.run import Run
from sopdeploy.training.run_folder import RunFolder


class Proposal(NamedTuple):
    """Whether a procedure should replace the training loop for some images, and why."""

    accepted: bool
    reason: str = ""


class Procedure(ABC):
    """A way to train a network; its config is a table of the recipe. Subclasses take it as only argument."""

    def training_data(self, _recipe: Recipe, data: Split) -> Split:
        """Divide the images of *data* into training and held-out images in another way, if needed."""
        return data

    def propose(self, _recipe: Recipe, _data: Split, _max_minutes: float) -> Proposal:
        """Decide whether `procedure.kind = "auto"` selects this procedure, in at most *max_minutes*."""
        return Proposal(False)

    @abstractmethod
    def fit(self, run: Run, data: Split, folder: RunFolder, callback: Callback) -> ProcedureResult:
        """Train *run*, which may be a resumed or a finished one, on *data*.

        Writes `best.pt`, `last.pt` and the history to *folder*, sets `run.decision` and returns the result.
        """


class Selection(NamedTuple):
    """The procedure that trains, the recipe with its config, its images, and why it was selected."""

    procedure: Procedure
    recipe: Recipe
    data: Split
    reason: str = ""


def select_procedure(recipe: Recipe, data: Split, recorded: ProcedureConfig | None = None) -> Selection:
    """Select the procedure of *recipe*; "auto" decides by the images, or continues with the *recorded* one.

    Raises `ConfigError` if the procedure cannot train the network of *recipe*.
    """
    config: ProcedureConfig = recipe.procedure
    reason = ""
    if isinstance(config, AutoConfig):
        config, reason = (
            (recorded, "") if recorded is not None else _propose(recipe, data, config.max_minutes)
        )
    procedure, recipe = _create(config), recipe.model_copy(update={"procedure": config})
    return Selection(procedure, recipe, procedure.training_data(recipe, data), reason)


def _propose(recipe: Recipe, data: Split, max_minutes: float) -> tuple[ProcedureConfig, str]:
    """Return the config of the first procedure that accepts, or that of the training loop; and the reason."""
    reasons = []
    for config_class in PROCEDURES:
        config = config_class.model_validate({})
        proposal = _create(config).propose(recipe, data, max_minutes)
        if proposal.accepted:
            return config, proposal.reason
        reasons.append(proposal.reason)
    return LoopConfig(), " ".join(filter(None, reasons))


def _create(config: ProcedureConfig) -> Procedure:
    procedure: Procedure = pkgutil.resolve_name(config.implementation)(config)
    return procedure


def parse_result(record: Any) -> ProcedureResult:
    """Parse the result of a procedure by its `kind`.

    Raises `pydantic.ValidationError` if it is invalid, and `ConfigError` if the procedure is not installed.
    """
    if isinstance(record, ProcedureResult):
        return record
    kinds = {config.result.model_fields["kind"].default: config.result for config in PROCEDURES}
    if record["kind"] not in kinds:
        raise ConfigError(
            f"the procedure {record['kind']!r}, which trained the network, is not part of this installation; "
            "install sopdeploy with this procedure"
        )
    return kinds[record["kind"]].model_validate(record)


AnyProcedureResult = Annotated[
    pydantic.SerializeAsAny[ProcedureResult], pydantic.BeforeValidator(parse_result)
]


def read_result(training: Mapping[str, Any]) -> ProcedureResult | None:
    """Read the result of the procedure from the record of a training; None before its end."""
    return parse_result(training["procedure"]) if "procedure" in training else None
