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

    def _repr_html_(self) -> str:
        epoch = {} if self.few_shot is not None else {"epoch": f"{self.best_epoch} of {self.epochs}"}
        found = self.few_shot or self.estimate
        notes: tuple[str, ...] = ()
        if self.few_shot is not None:
            notes = self.few_shot.lines()
        elif self.estimate is not None:
            notes = (self.estimate.describe(),)
        tiles = {
            **epoch,
            **({} if found is None else score_tile(found)),
            "training images": str(self.train_count),
            "held-out images": str(self.held_out_count),
            "classes": str(self.classes),
            "time": f"{self.seconds:.0f} s",
        }
        predictions, reason = None, f"{self.held_out_count} held-out images; sopdeploy.evaluate does it"
        if self.held_out_count <= MAX_EVALUATED:
            try:
                predictions, reason = self.predictions, "the held-out images are not available"
            except SopdeployError as error:  # the run was moved or deleted
                reason = str(error)
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
