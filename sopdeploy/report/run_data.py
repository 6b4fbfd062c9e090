"""What the page tells of a run: its history, its recipe, and how its network answers held-out pictures."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
from PIL import Image

from sopdeploy.checkpoint import Checkpoint, build_classifier, read_checkpoint
from sopdeploy.config import first_problem
from sopdeploy.data.base import LabeledImages
from sopdeploy.data.datasets.folder import open_classes
from sopdeploy.data.sources import open_data
from sopdeploy.errors import CheckpointError, ConfigError, DataError
from sopdeploy.evaluation.metrics import ClassificationReport, Score, classification_report
from sopdeploy.evaluation.prediction import score_images
from sopdeploy.images.preprocess import Preprocess, to_rgb
from sopdeploy.training.history import EpochRow
from sopdeploy.training.recipe import Recipe
from sopdeploy.training.resume import recorded_recipe
from sopdeploy.training.run import Position

WORST = 24  # mistakes that are shown
THUMBNAIL = 128  # pixels of the longer side
QUALITY = 75


@dataclass(frozen=True, kw_only=True, slots=True)
class Mistake:
    """A picture that was taken for another class, as a small JPEG in base64."""

    shown: str
    answered: str
    confidence: float
    likelihood: float
    jpeg: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """How the network answers: figures, the worst mistakes, and whose pictures these are."""

    measured: ClassificationReport
    mistakes: tuple[Mistake, ...]
    pictures: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """A run. `answers` is missing where its pictures are not at hand; `reason` then says why."""

    run: Path
    recipe: Recipe
    labels: tuple[str, ...]
    history: tuple[EpochRow, ...]
    record: dict[str, Any]
    answers: Answers | None
    reason: str = ""


def read_story(run: Path, data: Path | None, on_image: Callable[[int, int], None]) -> Story:
    """Return the story of the run in the folder *run*.

    Its network is that of `best.pt`; it is measured on the folder *data*, else on what the recipe holds out,
    where that is at hand. Raises `ConfigError` for a folder without a finished epoch.
    """
    last, best = run / "last.pt", run / "best.pt"
    if not last.is_file() or not best.is_file():
        raise ConfigError(f"{run}: holds no run with a finished epoch; give the folder of `sopdeploy train`")
    stored = read_checkpoint(last)
    recipe = recorded_recipe(stored, last)
    history = read_history(stored, last)
    checkpoint = read_checkpoint(best)
    answers, reason = None, ""
    try:
        pictures, name = pictures_for(recipe, checkpoint, data)
    except (ConfigError, DataError) as problem:
        if data is not None:
            raise
        reason = str(problem)
    else:
        answers = answers_of(checkpoint, best, pictures, name, recipe.workers, on_image)
    return Story(
        run=run,
        recipe=recipe,
        labels=stored.labels,
        history=history,
        record=checkpoint.training,
        answers=answers,
        reason=reason,
    )


def read_history(stored: Checkpoint, where: Path) -> tuple[EpochRow, ...]:
    """Return the epochs of a run; raises `CheckpointError` where there is none to read."""
    try:
        history = Position.model_validate((stored.resume or {})["position"]).history
    except pydantic.ValidationError as problem:
        raise CheckpointError(f"{where}: {first_problem(problem)}; train again") from problem
    except (KeyError, TypeError) as problem:
        raise CheckpointError(f"{where}: holds no history; give the last.pt of a run") from problem
    if not history:
        raise CheckpointError(f"{where}: no epoch of the run is finished; go on with --resume")
    return history


def pictures_for(recipe: Recipe, checkpoint: Checkpoint, data: Path | None) -> tuple[LabeledImages, str]:
    """Return what to measure on, and its name."""
    if data is not None:
        return open_classes(data, tuple(sorted(checkpoint.labels))), f"the pictures in {data.name}"
    held_out = open_data(recipe.data).held_out
    if set(held_out.labels) != set(checkpoint.labels):
        raise DataError("the data has other classes now than when the run began; give --data")
    return held_out, "the held-out pictures, on which the best epoch was chosen: other pictures are harder"


def answers_of(
    checkpoint: Checkpoint,
    where: Path,
    pictures: LabeledImages,
    name: str,
    workers: int,
    on_image: Callable[[int, int], None],
) -> Answers:
    """Return how the network of *checkpoint* answers *pictures*."""
    model = build_classifier(checkpoint, where)
    rules = checkpoint.preprocess
    scores = score_images(model, checkpoint.labels, pictures, rules, workers=workers, on_image=on_image)
    return Answers(
        measured=classification_report(pictures.labels, scores),
        mistakes=tuple(worst(scores, pictures, rules)),
        pictures=name,
    )


def worst(scores: Sequence[Score], pictures: LabeledImages, rules: Preprocess) -> list[Mistake]:
    """Return the mistakes that the network was surest of."""
    wrong = [place for place, one in enumerate(scores) if not one.correct]
    wrong.sort(key=lambda place: (-scores[place].confidence, place))
    return [
        Mistake(
            shown=pictures.labels[scores[place].target],
            answered=pictures.labels[scores[place].top5[0]],
            confidence=scores[place].confidence,
            likelihood=scores[place].likelihood,
            jpeg=thumbnail(pictures[place][0], rules),
        )
        for place in wrong[:WORST]
    ]


def thumbnail(picture: Image.Image, rules: Preprocess) -> str:
    """Return *picture* as a small JPEG in base64, without what its file said of place and time."""
    small = to_rgb(picture, rules).copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=QUALITY)
    return base64.b64encode(file.getvalue()).decode("ascii")
