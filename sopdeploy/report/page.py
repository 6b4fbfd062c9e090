"""Write the report of a run: one self-contained HTML page."""

from collections.abc import Callable
from pathlib import Path

from sopdeploy.errors import ConfigError
from sopdeploy.evaluation.metrics import ClassificationReport
from sopdeploy.files import atomic_write
from sopdeploy.html.templates import render
from sopdeploy.report.predictions import predictions_context, score_tiles
from sopdeploy.report.run_data import RunData, read_run
from sopdeploy.report.training import training_context
from sopdeploy.training.epoch_choice import LoopResult, estimate_best
from sopdeploy.training.procedure import read_result
from sopdeploy.training.procedure_config import ProcedureResult
from sopdeploy.training.recipe import flatten


def write_run_report(
    run: Path,
    destination: Path | None = None,
    *,
    data: Path | None = None,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
) -> Path:
    """Write the report of the run in the folder *run* and return its path.

    The default *destination* is `report.html` in *run*. *data* is a folder with one subfolder per class; by
    default the held-out images are evaluated. Raises `ConfigError` if the page cannot be written.
    """
    path = destination or run / "report.html"
    page = _render_report(read_run(run, data, on_image))
    try:
        with atomic_write(path) as partial:
            partial.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); give another file") from error
    return path


def _render_report(data: RunData) -> str:
    """Render the page as HTML; the same data always gives the same text."""
    recipe, best, record = data.recipe, data.best, data.best.training
    result = read_result(record) or estimate_best(data.history, frozen_backbone=recipe.frozen_backbone)
    tiles = {
        **score_tiles(result),
        "seed": str(recipe.seed),
        "time": f"{data.history[-1].seconds:.0f} s",
    }
    if data.predictions is not None and isinstance(data.predictions.metrics, ClassificationReport):
        tiles["calibration error"] = f"{data.predictions.metrics.calibration.error:.4f}"
    values = [*flatten(recipe.model_dump(mode="json")), *flatten(best.config, "network.")]
    environment = {f"{name} version": version for name, version in record.get("versions", {}).items()}
    environment |= record.get("machine", {})
    environment["weights in best.pt"] = f"{record.get('weights', 'raw')}, of epoch {record.get('epoch')}"
    return render(
        "sopdeploy.report",
        "run.html",
        recipe=recipe,
        model=best.model,
        training=_describe_training(data, result),
        labels=best.labels,
        result=result,
        history=data.history,
        tiles=tiles,
        decision=[] if best.decision is None else best.decision.rows(best.labels),
        reason=data.reason,
        wrong_labels=data.wrong_labels,
        groups=data.groups,
        recipe_values=[
            (key, value)
            for key, value in values
            if recipe.procedure.reads(key) and key != "summary" and not key.startswith("model.config.")
        ],
        environment=list(environment.items()),
        **training_context(data.history),
        **predictions_context(data.predictions),
    )


def _describe_training(data: RunData, result: ProcedureResult) -> str:
    """Describe in a sentence what was trained: the start weights, the images and the procedure."""
    start, side = data.best.training.get("start"), data.recipe.preprocess.crop
    weights = "random weights" if start is None else f"the weights of {start['file']} ({start['network']})"
    epochs, finished = data.recipe.epochs, len(data.history)
    how = f"by the {result.kind.replace('_', '-')} procedure"
    if isinstance(result, LoopResult):
        how = f"for {epochs} epoch{'s' * (epochs > 1)}"
        if finished < epochs:
            how += f" (in progress: {finished} finished)"
    images = f"{data.train_count} images, scaled to {side} x {side} pixels"
    return f"Trained from {weights} on {images}, {how}."
