"""The result of `sopdeploy.train`."""

import pydantic

from sopdeploy.errors import SopdeployError
from sopdeploy.html.templates import render
from sopdeploy.report.predictions import predictions_context, score_tile
from sopdeploy.report.run_data import Predictions, RunData, read_run
from sopdeploy.training.loop import TrainingResult

MAX_EVALUATED = 5000  # held-out images that a notebook evaluates to show a result


class TrainedRun(TrainingResult):
    """The files and metrics of a finished run.

    A notebook shows a summary, the confusion matrix and the worst mistakes of `best` on the held-out images.
    The first display evaluates these images.
    """

    _evaluated: RunData | None = pydantic.PrivateAttr(None)

    @property
    def predictions(self) -> Predictions | None:
        """Metrics and worst mistakes of `best` on the held-out images; None if they are not available."""
        if self._evaluated is None:
            self._evaluated = read_run(self.out, None, lambda _done, _total: None)
        return self._evaluated.predictions

    def _predictions_or_reason(self) -> tuple[Predictions | None, str]:
        """Return `predictions`, and the reason to show if there are none."""
        if self.held_out_count > MAX_EVALUATED:
            return None, f"more than {MAX_EVALUATED} held-out images; call sopdeploy.evaluate"
        try:
            return self.predictions, "the held-out images are not available"
        except SopdeployError as error:  # the run was moved or deleted
            return None, str(error)

    def _repr_html_(self) -> str:
        tiles: dict[str, str] = {}
        notes: tuple[str, ...] = ()
        if self.few_shot is not None:
            tiles |= score_tile(self.few_shot)
            notes = self.few_shot.lines()
        else:
            tiles["epoch"] = f"{self.best_epoch} of {self.epochs}"
            if self.estimate is not None:
                tiles |= score_tile(self.estimate)
                notes = (self.estimate.describe(),)
        tiles |= {
            "training images": str(self.train_count),
            "held-out images": str(self.held_out_count),
            "classes": str(self.classes),
            "time": f"{self.seconds:.0f} s",
        }
        predictions, reason = self._predictions_or_reason()
        return render(
            "sopdeploy.api",
            "scores.html",
            title=f"{self.model}, {self.out}",
            tiles=tiles,
            notes=notes,
            reason=reason,
            next=f"sopdeploy.export({str(self.best)!r}, detach=True)",
            **predictions_context(predictions),
        )
