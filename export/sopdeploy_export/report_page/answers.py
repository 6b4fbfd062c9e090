"""The section on the answers: how often the top class agrees, and every one that does not."""

from collections import Counter
from collections.abc import Sequence

from sopdeploy.html.amounts import percent
from sopdeploy.html.charts import interval
from sopdeploy.html.heat import heat
from sopdeploy.html.markup import Html, figure, paragraph, section, table
from sopdeploy_export.findings import Findings
from sopdeploy_export.parity.report import Flip

MOST_CLASSES = 30  # of a matrix that can still be read
BECAUSE = {
    "noise": "noise: the network itself was unsure",
    "routing": "routing: the gate was unsure",
    "error": "error: the network was sure",
}


def answers_section(found: Findings) -> Html:
    """Return how often the top class agrees, with its interval, and every flip."""
    top1 = found.parity.top1
    said = (
        f"The top class is the network's on {top1.agree} of {top1.images} probe images; so many images bound "
        f"the true share to {percent(top1.low)} to {percent(top1.high)} (Wilson's interval at 95 %)."
    )
    chart = interval(
        "agreement", "Share of images with the same top class", top1.agree / top1.images, top1.low, top1.high
    )
    flips = (
        table(
            f"Flips: {top1.flips_within_noise} noise, {top1.flips_by_routing} routing, {top1.flips} wrong",
            ("image", "network says", "file says", "network's margin", "put down to"),
            [flip_row(flip, found.checkpoint.labels) for flip in top1.flipped],
        )
        if top1.flipped
        else paragraph("No answer flips.")
    )
    return section(
        "Answers",
        "answers",
        paragraph(said),
        figure(chart, "Seen, and the 95 % interval."),
        *flip_matrix(top1.flipped, found.checkpoint.labels),
        flips,
    )


def flip_matrix(flipped: Sequence[Flip], labels: tuple[str, ...]) -> list[Html]:
    """Return which class became which, where any did and not more than can be read."""
    classes = sorted({number for flip in flipped for number in (flip.network, flip.file)})
    if not 0 < len(classes) <= MOST_CLASSES:
        return []
    counts = Counter((flip.network, flip.file) for flip in flipped)
    most = max(counts.values())
    names = [labels[number] for number in classes]
    rows = [(labels[said], [counts[said, became] / most for became in classes]) for said in classes]
    numbers = [[str(counts[said, became]) for became in classes] for said in classes]
    matrix = heat("flips", "Answers that flip", rows, names, numbers, wrong_off_diagonal=True)
    return [
        figure(
            matrix,
            "Rows are the network's top class, columns the file's; only the classes of flips, answers that "
            "agree are not counted.",
        )
    ]


def flip_row(flip: Flip, labels: tuple[str, ...]) -> tuple[str, ...]:
    """Return one flip as a row."""
    return (
        str(flip.image),
        labels[flip.network],
        labels[flip.file],
        f"{flip.margin:.3g}",
        BECAUSE[flip.because],
    )
