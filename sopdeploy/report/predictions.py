"""The sections on the answers: figures with intervals, classes, confusions, calibration, worst mistakes."""

from sopdeploy.evaluation.metrics import ClassificationReport, Rate
from sopdeploy.html.charts import Axis, Curve, heat, interval, plot
from sopdeploy.html.markup import Html, figure, folded, paragraph, percent, section, table, tag
from sopdeploy.report.run_data import Answers, Mistake, Story
from sopdeploy.report.training import pairs

MOST_CLASSES = 30  # of a matrix that can still be read
PAIRS = 15


def answers_section(story: Story) -> Html:
    """Return how good the answers are, or why that is not known."""
    if story.answers is None:
        return section(
            "Answers",
            "answers",
            paragraph(
                f"Not measured, the pictures are not at hand: {story.reason}. Give them with ",
            ),
            paragraph(tag("code", "sopdeploy report RUN --data DIR")),
        )
    found = story.answers.measured
    top1 = found.top1
    return section(
        "Answers",
        "answers",
        paragraph(f"best.pt on {found.count} pictures: {story.answers.pictures}."),
        figure(
            interval("share", "Right first answers", top1.share, top1.low, top1.high),
            f"Top-1 {told(top1)}, top-5 {told(found.top5)}, negative log-likelihood {found.nll:.4f}.",
        ),
        confusion(found),
        folded("Every class", classes_table(found)),
    )


def confusion(found: ClassificationReport) -> Html:
    """Return who is taken for whom: a matrix of few classes, of many the most frequent mistakes."""
    names = [one.label for one in found.classes]
    pairs_found = sorted(
        (-count, names[shown], names[answered])
        for shown, row in enumerate(found.confusion)
        for answered, count in enumerate(row)
        if count and shown != answered
    )[:PAIRS]
    frequent = table(
        "The most frequent mistakes" if pairs_found else "There was no mistake",
        ("shown", "answered", "pictures"),
        [(shown, answered, str(-count)) for count, shown, answered in pairs_found],
        kind="figures",
    )
    if len(names) > MOST_CLASSES:
        return frequent
    rows = [
        (name, [count / max(1, sum(row)) for count in row])
        for name, row in zip(names, found.confusion, strict=True)
    ]
    numbers = [[str(count) for count in row] for row in found.confusion]
    matrix = heat("confusion", "Who is taken for whom", rows, names, numbers, wrong_off_diagonal=True)
    return pairs(figure(matrix, "Rows are what pictures show, columns what was answered."), frequent)


def classes_table(found: ClassificationReport) -> Html:
    """Return precision and recall of every class."""
    return table(
        "Precision and recall",
        ("class", "pictures", "answered", "precision", "recall", "95 % of recall"),
        [
            (
                one.label,
                str(one.count),
                str(one.answered),
                "none answered" if one.precision is None else percent(one.precision),
                percent(one.recall.share),
                f"{percent(one.recall.low)} to {percent(one.recall.high)}",
            )
            for one in found.classes
        ],
        kind="figures",
    )


def calibration_section(story: Story) -> Html | None:
    """Return whether the network is as often right as it is sure."""
    if story.answers is None:
        return None
    found = story.answers.measured.calibration
    seen = tuple(
        (one.confidence, one.accuracy)
        for one in found.curve
        if one.confidence is not None and one.accuracy is not None
    )
    lines = (
        Curve(name="this network", points=seen),
        Curve(name="as sure as right", points=((0.0, 0.0), (1.0, 1.0))),
    )
    unit = Axis("confidence of the first answer", low=0.0, high=1.0)
    rows = [
        (
            f"{one.low:.3f} to {one.high:.3f}",
            str(one.count),
            "" if one.confidence is None else f"{one.confidence:.4f}",
            "" if one.accuracy is None else f"{one.accuracy:.4f}",
        )
        for one in found.curve
    ]
    return section(
        "Calibration",
        "calibration",
        paragraph(f"Expected calibration error {found.error:.4f}, over {found.bins} bins of equal width."),
        figure(
            plot(
                "calibrated",
                "Confidence and accuracy",
                lines,
                unit,
                Axis("share of right answers", low=0.0, high=1.0),
            ),
            "Below the dashed line the network is surer than it is right.",
        ),
        folded(
            "The bins", table("Bins", ("confidence", "pictures", "its mean", "right"), rows, kind="figures")
        ),
    )


def mistakes_section(story: Story) -> Html | None:
    """Return the pictures that the network was surest of and wrong about."""
    if story.answers is None or not story.answers.mistakes:
        return None
    return section(
        "The worst mistakes",
        "mistakes",
        paragraph("Surest first. Look for wrong labels before you look for a better network."),
        tag("div", *map(mistake, story.answers.mistakes), class_="mistakes"),
    )


def mistake(one: Mistake) -> Html:
    """Return one picture with what was said of it."""
    said = f"{one.shown} ({percent(one.likelihood)}), taken for {one.answered} ({percent(one.confidence)})"
    return figure(tag("img", src=f"data:image/jpeg;base64,{one.jpeg}", alt=said), said)


def told(rate: Rate) -> str:
    """Return a share with its interval."""
    return f"{percent(rate.share, 2)} ({percent(rate.low)} to {percent(rate.high)})"


def answer_tiles(answers: Answers) -> dict[str, str]:
    """Return the figures of the answers that matter most."""
    return {"calibration error": f"{answers.measured.calibration.error:.4f}"}
