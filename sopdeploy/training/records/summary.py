"""The file `run.json` of a run: what a list of runs shows, without the weights. Does not import torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sopdeploy.base.config import FieldValues, StrictModel, parse_json
from sopdeploy.base.files import SUMMARY, atomic_write, read_text, writing
from sopdeploy.base.project import Origin

# Entries of the record of a training that lists of runs read
_LISTED = ("start", "procedure", "warnings")


class RunSummary(StrictModel):
    """What lists of runs show about a run.

    `training` has the entries of `TrainingRecord` that say how the run ended; `origin` has no
    `sample`.
    """

    project: str
    origin: Origin | None
    training: FieldValues

    @classmethod
    def of(
        cls, project: str, origin: Origin | None, training: Mapping[str, Any]
    ) -> "RunSummary":
        """Summarize the content of a `best.pt`."""
        return cls(
            project=project,
            origin=None if origin is None else origin.model_copy(update={"sample": ()}),
            training={key: training[key] for key in _LISTED if key in training},
        )

    def write(self, folder: Path) -> None:
        """Write `run.json` into the *folder* of the run."""
        path = folder / SUMMARY
        with writing(path), atomic_write(path) as partial:
            partial.write_text(self.model_dump_json(indent=1), encoding="utf-8")


def read_summary(folder: Path) -> RunSummary | None:
    """Read `run.json` in the *folder* of a run; None if it is missing, damaged, or of another version."""
    try:
        return RunSummary.model_validate(parse_json(read_text(folder / SUMMARY)))
    except (OSError, ValueError):
        return None


def training_rows(training: Mapping[str, Any]) -> Sequence[tuple[str, object]]:
    """List what the record *training* of a checkpoint says.

    These are:

    - without a result: its scalars,
    - after the training loop: its scalars, and the result,
    - after another procedure: the pretrained weights, and the result.

    The warnings of the run are last.
    """
    if "procedure" not in training:  # there is no result, either
        return _scalars(training)
    from sopdeploy.training.records.results import LoopResult, read_result  # noqa: PLC0415 # most exports need none

    result = read_result(training)
    if result is None:
        return _scalars(training)
    warnings = [("warning", warning) for warning in training.get("warnings", ())]
    if isinstance(result, LoopResult):
        return [*_scalars(training), *result.rows(), *warnings]

    rows: list[tuple[str, object]] = []
    start = training.get("start")
    if start:
        weights = f"{start['network']}, {start['file']}, sha256 {start['sha256']}"
        rows.append(("pretrained weights", weights))
    return [*rows, *result.rows(), *warnings]


def _scalars(training: Mapping[str, Any]) -> list[tuple[str, object]]:
    """List the numbers and texts in *training*, without truth values, sorted by key."""
    scalars = (
        (key, value) for key, value in sorted(training.items()) if not isinstance(value, bool)
    )
    return [(key, value) for key, value in scalars if isinstance(value, int | float | str)]
