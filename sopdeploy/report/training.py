"""The sections on how the run went: losses and heads over the epochs, the learning rate, the time."""

from collections.abc import Callable
from functools import partial

from sopdeploy.html.charts import Axis, Bar, Curve, bars, heat, plot
from sopdeploy.html.markup import Html, figure, folded, paragraph, percent, section, short, table, tag
from sopdeploy.report.run_data import Story
from sopdeploy.training.diagnostics import GateFigures, Spectrum
from sopdeploy.training.history import EpochRow, best_row, columns, table_row

EPOCHS = Axis("epoch")


def learning_section(story: Story) -> Html:
    """Return what was learnt, head by head."""
    history = story.history
    parts = {name: None for row in history for name in row.losses}
    seen = {name for row in history if row.sight for name in row.sight.heads}
    heads = sorted(seen, key=lambda name: (name != "main", name))  # as the training losses stand
    training = [over_epochs(story, name, partial(part_of_loss, name)) for name in parts]
    shown = [
        figure(
            plot("losses", "Loss on the training pictures", training, EPOCHS, Axis("loss")),
            "While it learns: the loss of every head, the penalties, and their weighted sum.",
        )
    ]
    top1 = [over_epochs(story, "what ships", lambda row: row.figures.top1)]
    loss = [over_epochs(story, "what ships", lambda row: row.figures.loss)]
    if len(heads) > 1:
        top1 += [over_epochs(story, name, partial(head, name, "top1")) for name in heads]
        loss += [over_epochs(story, name, partial(head, name, "loss")) for name in heads]
    shown += [
        figure(
            plot("top1", "Top-1 on held-out pictures", top1, EPOCHS, Axis("share of right first answers")),
            "On pictures it does not learn from.",
        ),
        figure(
            plot("held-out-loss", "Loss on held-out pictures", loss, EPOCHS, Axis("loss")),
            "Where this rises while top-1 does not fall, the network has become too sure of itself.",
        ),
    ]
    note = ""
    if len(heads) > 1 and history[-1].sight:
        note = (
            f"What ships is measured on all {history[-1].figures.count} held-out pictures, the heads "
            f"on {history[-1].sight.pictures} of them, always the same, with the raw weights."
        )
    return section("Learning", "learning", *([paragraph(note)] if note else []), pairs(*shown))


def course_section(story: Story) -> Html:
    """Return the learning rate, the gradient, and where the time went."""
    shown = [
        figure(
            plot(
                "rate",
                "Learning rate",
                [over_epochs(story, "rate", lambda row: row.lr)],
                EPOCHS,
                Axis("rate", low=0.0),
            ),
            "At the end of each epoch.",
        )
    ]
    if any(row.gradient is not None for row in story.history):
        line = over_epochs(story, "mean norm", lambda row: row.gradient)
        shown.append(
            figure(
                plot("gradient", "Norm of the gradient", [line], EPOCHS, Axis("norm", logarithmic=True)),
                "Before it is clipped.",
            )
        )
    if any(row.speed is not None for row in story.history):
        line = over_epochs(story, "waiting", lambda row: row.speed.waiting if row.speed else None)
        shown.append(
            figure(
                plot(
                    "waiting",
                    "Waiting for pictures",
                    [line],
                    EPOCHS,
                    Axis("share of the time", low=0.0, high=1.0),
                ),
                "Much of it: more workers, or smaller pictures.",
            )
        )
    rates = sorted(row.speed.pictures_per_second for row in story.history if row.speed)
    said = f"{story.history[-1].seconds:.0f} s in all."
    if rates:
        said += f" {short(round(rates[len(rates) // 2], 1))} pictures a second in the middle of the epochs."
    rows = [table_row(row) for row in story.history]
    names = columns(rows)
    numbers = table(
        "Every figure of every epoch",
        names,
        [[f"{row[name]:.5g}" if name in row else "" for name in names] for row in rows],
        kind="figures",
    )
    return section(
        "The course of the run", "course", paragraph(said), pairs(*shown), folded("All numbers", numbers)
    )


def over_epochs(story: Story, name: str, value: Callable[[EpochRow], float | None]) -> Curve:
    """Return a curve of what *value* gives, without the epochs in which it gives nothing."""
    points = ((float(row.epoch), value(row)) for row in story.history)
    return Curve(name=name, points=tuple((x, y) for x, y in points if y is not None))


def part_of_loss(name: str, row: EpochRow) -> float | None:
    """Return one part of the training loss, where it was still there."""
    return row.losses.get(name)


def head(name: str, what: str, row: EpochRow) -> float | None:
    """Return a figure of the head *name*, where it was still there."""
    found = row.sight.heads.get(name) if row.sight else None
    return None if found is None else float(getattr(found, what))


def summary(story: Story) -> dict[str, str]:
    """Return the figures that matter most."""
    best = best_row(story.history)
    last = story.history[-1]
    return {
        "best epoch": f"{best.epoch} of {story.recipe.epochs}",
        "top-1, best": percent(best.figures.top1, 2),
        "top-1, last": percent(last.figures.top1, 2),
        "top-5, best": percent(best.figures.top5, 2),
        "seed": str(story.recipe.seed),
        "time": f"{last.seconds:.0f} s",
    }


def pairs(*figures: Html) -> Html:
    """Return figures side by side where there is room."""
    return tag("div", *figures, class_="pair")


FAINTEST = 1e-6  # of the largest eigenvalue: below is rounding
MOST_EPOCHS = 24  # columns of a gate's history


def spectra_section(story: Story) -> Html | None:
    """Return the eigenvalues before and after normalisation, at the first and the last epoch with them."""
    kept = [row for row in story.history if row.sight and row.sight.spectra]
    if not kept:
        return None
    names = dict.fromkeys(name for row in kept for name in (row.sight.spectra if row.sight else ()))
    shown = []
    for number, name in enumerate(names):
        seen = [
            (row.epoch, row.sight.spectra[name]) for row in kept if row.sight and name in row.sight.spectra
        ]
        ends = [seen[0], seen[-1]] if len(seen) > 1 else seen
        lines = [
            Curve(name=f"{side}, epoch {epoch}", points=relative(found, side))
            for side in ("before", "after")
            for epoch, found in ends
        ]
        drawn = plot(
            f"spectrum-{number}",
            f"Eigenvalues at {name}",
            lines,
            Axis("place of the eigenvalue", logarithmic=True),
            Axis("relative to the largest", logarithmic=True, low=FAINTEST, high=1.0),
        )
        shown.append(figure(drawn, f"{name}: before and after the root."))
    return section(
        "Spectra of the covariances",
        "spectra",
        paragraph(
            "Means over the same few pictures. The square root lifts small eigenvalues towards the "
            "large ones: a steep curve before and a flatter one after is what it is for."
        ),
        pairs(*shown),
    )


def relative(spectrum: Spectrum, side: str) -> tuple[tuple[float, float], ...]:
    """Return the points of one side of a spectrum, the largest eigenvalue as 1."""
    values = spectrum.before if side == "before" else spectrum.after
    largest = values[0] or 1.0
    return tuple(
        (float(place), value / largest) for place, value in zip(spectrum.places, values, strict=True)
    )


def gates_section(story: Story) -> Html | None:
    """Return who a gate chose over the epochs, and how evenly."""
    kept = [row for row in story.history if row.sight and row.sight.gates]
    if not kept or kept[-1].sight is None:
        return None
    parts: list[Html] = []
    for number, name in enumerate(kept[-1].sight.gates):
        parts.append(gate_figure(story, kept, name, number))
    return section(
        "The gate",
        "gate",
        paragraph(
            "Without the noise of training, on held-out pictures. Imbalance 0 is all components alike."
        ),
        *parts,
    )


def gate_figure(story: Story, kept: list[EpochRow], name: str, number: int) -> Html:
    """Return the usage at the end, its history, and the imbalance, of one gate."""

    def of(row: EpochRow) -> GateFigures | None:
        return row.sight.gates.get(name) if row.sight else None

    def imbalance(row: EpochRow) -> float | None:
        found = of(row)
        return found.imbalance if found else None

    last = of(kept[-1])
    usage = last.chosen if last else ()
    rows = [
        Bar(label=f"component {place}", value=share, text=f"{share:.0%}") for place, share in enumerate(usage)
    ]
    step = -(-len(kept) // MOST_EPOCHS)
    shown = [(str(row.epoch), found.chosen) for row in kept[::step] if (found := of(row))]
    grid = [(f"component {place}", [chosen[place] for _, chosen in shown]) for place in range(len(usage))]
    told = [[f"{round(100 * share)}" for share in shares] for _, shares in grid]
    line = over_epochs(story, name, imbalance)
    return pairs(
        figure(
            bars(f"gate-{number}", f"Usage of the components of {name}", rows, 1.0),
            f"{name}: pictures that chose each component after the last epoch.",
        ),
        figure(
            heat(f"gate-time-{number}", "Usage over the epochs", grid, [epoch for epoch, _ in shown], told),
            "Percent of the pictures, epoch by epoch.",
        ),
        figure(
            plot(
                f"imbalance-{number}",
                "Imbalance",
                [line],
                EPOCHS,
                Axis("(deviation / mean) squared", low=0.0),
            ),
            "How unevenly the weights are spread.",
        ),
    )
