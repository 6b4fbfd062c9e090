"""Write the report of a run: one self-contained HTML page."""

from collections.abc import Callable
from pathlib import Path

from sopdeploy.errors import ConfigError
from sopdeploy.evaluation.metrics import ClassificationReport
from sopdeploy.evaluation.multi_label import MultiLabelMetrics
from sopdeploy.files import atomic_write
from sopdeploy.html.templates import percent, render
from sopdeploy.report.predictions import predictions_context
from sopdeploy.report.run_data import RunData, read_run
from sopdeploy.report.training import training_context
from sopdeploy.training.diagnostics import best_epoch
from sopdeploy.training.few_shot.config import FewShotResult
from sopdeploy.training.recipe import flatten


def write_report(
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
    page = render_report(read_run(run, data, on_image))
    try:
        with atomic_write(path) as partial:
            partial.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); give another --out") from error
    return path


def render_report(data: RunData) -> str:
    """Render the page as HTML; the same data always gives the same text."""
    last, recipe = data.history[-1], data.recipe
    best = best_epoch(data.history, frozen_backbone=recipe.frozen_backbone)
    figures = best.figures
    second = (
        {"macro F1": figures.macro_f1} if isinstance(figures, MultiLabelMetrics) else {"top-5": figures.top5}
    )
    tiles = {
        "best epoch": f"{best.epoch} of {recipe.epochs}",
        f"{figures.score_name}, best": percent(figures.score, 2),
        f"{figures.score_name}, last": percent(last.figures.score, 2),
        **{f"{name}, best": percent(value, 2) for name, value in second.items()},
        "seed": str(recipe.seed),
        "time": f"{last.seconds:.0f} s",
    }
    if data.predictions is not None and isinstance(data.predictions.metrics, ClassificationReport):
        tiles["calibration error"] = f"{data.predictions.metrics.calibration.error:.4f}"
    values = [*flatten(recipe.model_dump(mode="json")), *flatten(recipe.model.full_config(), "network.")]
    record = data.record
    few_shot = None
    if "few_shot" in record:
        few_shot = FewShotResult.model_validate(record["few_shot"])
        score = figures.score_name
        of_epochs = {"best epoch", f"{score}, best", f"{score}, last"}
        tiles = {key: text for key, text in tiles.items() if key not in of_epochs}
        tiles = {score: percent(few_shot.score.share, 1), "estimate": few_shot.estimated_on, **tiles}
    environment = {f"{name} version": version for name, version in record.get("versions", {}).items()}
    environment |= record.get("machine", {})
    environment["weights in best.pt"] = f"{record.get('weights', 'raw')}, of epoch {record.get('epoch')}"
    return render(
        "sopdeploy.report",
        "run.html",
        recipe=recipe,
        labels=data.labels,
        few_shot=few_shot,
        history=data.history,
        tiles=tiles,
        decision=[] if data.decision is None else data.decision.rows(data.labels),
        reason=data.reason,
        recipe_values=[(key, value) for key, value in values if not key.startswith("model.config.")],
        environment=list(environment.items()),
        **training_context(data.history),
        **predictions_context(data.predictions),
    )
