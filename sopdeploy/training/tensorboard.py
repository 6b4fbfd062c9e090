"""Learning curves for TensorBoard, written while a run trains (`sopdeploy train --tensorboard`)."""

from pathlib import Path
from typing import Any

from sopdeploy.base.environment import import_optional
from sopdeploy.errors import MissingPackageError
from sopdeploy.training.callback import Callback, ForwardingCallback
from sopdeploy.training.diagnostics import EpochRow, history_table

FOLDER = "tensorboard"  # in the folder of a run


class TensorBoard(ForwardingCallback):
    """Passes all events on to *callback*, and writes the columns of history.csv as curves to *folder*.

    The step of a curve is the epoch, from 1. The folder is created with the first epoch, and a
    resumed run continues the curves. Raises `MissingPackageError` without the package tensorboard.
    """

    def __init__(self, callback: Callback, folder: Path) -> None:
        super().__init__(callback)
        self.folder = folder
        import_optional("tensorboard", "tensorboard", ".[tensorboard]", MissingPackageError)
        self._writer: Any = None

    def on_epoch_end(self, row: EpochRow) -> None:
        """Add a point to each curve, and pass the *row* on."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 # imports tensorboard

            self._writer = SummaryWriter(str(self.folder), purge_step=row.epoch)

        _, (values,) = history_table([row])
        for name, value in values.items():
            self._writer.add_scalar(name, value, row.epoch)
        self._writer.flush()
        self.callback.on_epoch_end(row)
