"""The recipe table `[procedure]` and the result of a procedure: base classes, and the choice by time."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

from sopdeploy.config import Positive, StrictModel
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.evaluation.multi_label import MeanPrecision


class ProcedureResult(StrictModel):
    """The score to expect on new images and how it was found; part of the checkpoint `best.pt`."""

    kind: str

    @property
    @abstractmethod
    def score(self) -> Rate | MeanPrecision | float:
        """The accuracy, or the mAP."""

    @property
    @abstractmethod
    def score_name(self) -> str:
        """What `score` is; the name says if the score is too high."""

    @abstractmethod
    def lines(self) -> Sequence[str]:
        """Describe the result in lines for the terminal and the report."""

    @abstractmethod
    def rows(self) -> Sequence[tuple[str, str]]:
        """Describe the result in (name, text) rows for the model card."""


class ProcedureConfig(StrictModel):
    """Recipe table `[procedure]`: `kind` selects how to train, other keys are options of the procedure.

    Attributes:
        implementation: Module and name of the `Procedure`, which is imported when a run starts.
        result: The class of its result.
        unread: Recipe keys and tables that the procedure does not read.
    """

    implementation: ClassVar[str]
    result: ClassVar[type[ProcedureResult]]
    unread: ClassVar[tuple[str, ...]] = ()
    kind: str

    def reads(self, key: str) -> bool:
        """Check whether the procedure reads the dotted recipe *key*."""
        return not any(key == table or key.startswith(f"{table}.") for table in self.unread)


class AutoConfig(ProcedureConfig):
    """Select a procedure by the number of images and its predicted time, otherwise the training loop.

    The longest time is `max_minutes`. `select_procedure` replaces this config by that of the procedure.
    """

    kind: Literal["auto"] = "auto"
    max_minutes: Positive = 60.0
