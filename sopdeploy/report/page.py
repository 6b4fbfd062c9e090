"""`report.html` of a run: one page that needs no network and no script."""

from collections.abc import Callable
from pathlib import Path

from sopdeploy.errors import ConfigError
from sopdeploy.files import atomic_write
from sopdeploy.html.markup import Html, document, paragraph, section, table, tag
from sopdeploy.report.predictions import answer_tiles, answers_section, calibration_section, mistakes_section
from sopdeploy.report.run_data import Story, read_story
from sopdeploy.report.training import (
    course_section,
    gates_section,
    learning_section,
    spectra_section,
    summary,
)
from sopdeploy.training.resume import flat

LABELS_SHOWN = 20


def write_report(
    run: Path,
    destination: Path | None = None,
    *,
    data: Path | None = None,
    on_image: Callable[[int, int], None] = lambda _done, _all: None,
) -> Path:
    """Write the page of the run in the folder *run* and return where it is; `report.html` there by default.

    *data* is a folder of pictures to measure on, one subfolder per class. The file is written whole or not.
    """
    path = destination or run / "report.html"
    text = render(read_story(run, data, on_image))
    try:
        with atomic_write(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as problem:
        raise ConfigError(f"{path}: cannot be written ({problem.strerror}); give another --out") from problem
    return path


def render(story: Story) -> str:
    """Return the page; the same story gives the same text."""
    sections = (
        learning_section(story),
        answers_section(story),
        calibration_section(story),
        mistakes_section(story),
        spectra_section(story),
        gates_section(story),
        course_section(story),
        recipe_section(story),
        origin_section(story),
    )
    title = f"{story.recipe.model.name}: how it learnt"
    return document(title, header(story), *(one for one in sections if one is not None))


def header(story: Story) -> Html:
    """Return the name, the figures that matter most, and the classes."""
    tiles = summary(story) | (answer_tiles(story.answers) if story.answers else {})
    labels = ", ".join(story.labels[:LABELS_SHOWN])
    more = len(story.labels) - LABELS_SHOWN
    done = len(story.history)
    state = story.recipe.summary
    if done < story.recipe.epochs:
        state += f" (under way: {done} of {story.recipe.epochs} epochs)"
    return tag(
        "header",
        tag("h1", story.recipe.model.name),
        paragraph(state),
        tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in tiles.items())),
        paragraph(f"{len(story.labels)} classes: {labels}" + (f" and {more} more" if more > 0 else "")),
    )


def recipe_section(story: Story) -> Html:
    """Return every value the run was made with, those that its recipe left out too."""
    values = flat(story.recipe.model_dump(mode="json"))
    network = flat(story.recipe.model.full_config(), "the network's ")
    rows = [(key, str(value)) for key, value in [*values, *network] if not key.startswith("model.config.")]
    return section("Recipe", "recipe", table("Every value of the run", ("key", "value"), rows))


def origin_section(story: Story) -> Html:
    """Return what the run was made by and on."""
    facts = {f"{name} version": str(version) for name, version in story.record.get("versions", {}).items()}
    facts |= {name: str(value) for name, value in story.record.get("machine", {}).items()}
    facts["weights in best.pt"] = (
        f"{story.record.get('weights', 'raw')}, of epoch {story.record.get('epoch')}"
    )
    return section("Made by", "origin", table("Versions and machine of the run", ("what", ""), facts.items()))
