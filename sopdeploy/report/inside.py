"""The sections on what training did inside: spectra of covariances, and who a gate chose."""

from sopdeploy.html.charts import Bar, bars
from sopdeploy.html.heat import heat
from sopdeploy.html.markup import Html, figure, paragraph, section
from sopdeploy.html.plot import Axis, Curve, plot
from sopdeploy.report.learning import EPOCHS, over_epochs, pairs
from sopdeploy.report.story import Story
from sopdeploy.training.history import EpochRow
from sopdeploy.training.sight import GateFigures, Spectrum

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
