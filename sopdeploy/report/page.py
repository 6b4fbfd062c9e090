"""Write the page about a finished run: curves, predictions, photographs, recipe and environment.

Letters: N images, C classes.
"""

import base64
import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sopdeploy.base.files import BEST, atomic_write, writing
from sopdeploy.bundle.decision import Decision
from sopdeploy.data.photos.photo import LabeledImages
from sopdeploy.errors import DataError, amount
from sopdeploy.evaluation.metrics import (
    ClassificationReport,
    ImageScore,
    Rate,
    ThresholdMetrics,
)
from sopdeploy.evaluation.multi_label import (
    MeanPrecision,
    MultiLabelMetrics,
    MultiLabelPredictions,
    MultiLabelReport,
)
from sopdeploy.evaluation.prediction import score_images
from sopdeploy.evaluation.predictions import (
    MAX_CONFUSIONS,
    MAX_MATRIX_CLASSES,
    Predictions,
    describe_predictions,
    describe_thresholds,
    make_predictions,
    measure_predictions,
    plot_recalls,
    tabulate_classes,
    tabulate_matrix,
    tabulate_mistakes,
)
from sopdeploy.html.plots import component_chart, plot
from sopdeploy.html.report import (
    Card,
    Figure,
    HtmlReport,
    Section,
    Table,
    insert_names,
    percent,
    render,
)
from sopdeploy.report.wrong_labels import list_wrong_labels
from sopdeploy.training.diagnostics import EpochRow, history_curve
from sopdeploy.training.few_shot.state import FewShotFit
from sopdeploy.training.records.checkpoints import Fit, Setup
from sopdeploy.training.records.results import (
    LIST_WRONG_LABELS,
    AnyProcedureResult,
    ClassScore,
    LoopResult,
    describe_for_page,
    describe_notes,
    insert_folders,
)
from sopdeploy.training.settings.recipe import flatten
from sopdeploy.training.train import (
    PREDICTIONS,
    FinishedRun,
    ImagePrediction,
    describe_problem,
)

PAGE = "report.html"
_MAX_SHOWN = 24  # photographs of a section
_MAX_GROUPS = 12  # of copies
_MAX_COPIES = 4  # of a group
_MAX_CARDS = 24  # classes with sample photos
_SAMPLES = 2  # photos of a class
_CARD_SIDE = 112  # pixels
_MAX_CELLS = 60  # kinds of mistakes that are shown
_SIDE = 480  # pixels of the longer side of an opened photograph
_JPEG_QUALITY = 75
_DECISION = "Fitted to predictions of images that were not used for training."
_CALIBRATION = "The export divides the last layer by the temperature, unless you give --set trained_logits=true."
_REJECTION = (
    "A photo counts as unknown if its score is below the threshold. The score says how similar it is to "
    "the classes."
)
_WORST = (
    "The photos show the worst mistakes, by class and prediction, the most confident mistakes first. Check for "
    "wrong labels before you look for a better network."
)
_CONFUSED = (
    "The photos show the most frequent mistakes, and for each one the most confident predictions first. Check for "
    "wrong labels before you look for a better network."
)
_TRAINING_LOSSES = "Losses of the heads, the penalties, and their weighted sum."


class PageFacts(NamedTuple):
    """What the page about a run counts of the images that the score counts.

    `mistakes` are true class, predicted class and number of images, the most frequent one first;
    `thresholds` are what thresholds on the confidence do. Both are empty if images have several
    classes. `classes` are the precision and the recall of each class.
    """

    mistakes: list[tuple[str, str, int]]
    thresholds: tuple[ThresholdMetrics, ...]
    classes: tuple[ClassScore, ...]


def write_run_page(
    run: FinishedRun,
    folder: Path,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
    before: Sequence[tuple[object, ...]] = (),
) -> PageFacts:
    """Write `report.html` about the finished *run* to *folder*.

    It shows validation images, or else the out-of-fold predictions of the training images.
    *on_image* receives the numbers of images evaluated and in total. *before* are earlier runs:
    date, run, numbers of images and classes, and accuracy.
    """
    setup = run.setup
    fit = run.fit
    result: Any = fit.result
    texts = describe_for_page(result)
    data_folder = setup.recipe.data_folder

    # What the page judges: the validation images, or the predictions of cross-validation.
    images, description, logits_NC = _predict_shown_images(setup, fit, texts.held_out, on_image)
    decision = None if fit.decision is None else fit.decision.for_trained_logits()
    predicted = make_predictions(logits_NC, images, setup.labels, decision)
    metrics = measure_predictions(predicted, images.labels, result.score)
    _write_predictions(folder / PREDICTIONS, predicted, images)

    # Without a score, predictions and mistakes say nothing about other photographs.
    is_measured = result.score is not None
    sections = [_show_classes(setup.data.train, metrics if is_measured else None)]
    if is_measured:
        sections += _describe_mistakes(predicted, metrics, images, description)

    # What the training images tell, how it was trained, and what it learned.
    if isinstance(fit, FewShotFit):
        command = insert_folders(LIST_WRONG_LABELS, data_folder, folder)
        sections.append(_show_wrong_labels(setup.data.train, fit, command))
        sections.append(_show_copies(setup.data.train, fit))
    sections.append(_describe_training(setup, fit, texts.procedure))
    if before:
        sections.append(_list_runs_before(before))
    lines = [insert_folders(line, data_folder, folder) for line in result.lines()]
    sections.append(_describe_learning(fit.position.history, result, lines))
    if fit.decision is not None:
        sections.append(_describe_decision(fit.decision, setup.labels))
    sections += _describe_run(setup, fit, run.record)

    # The page begins with the accuracy, what the images tell, and what comes next.
    score = result.describe_score()
    notes = describe_notes(result)
    problem = describe_problem(setup, fit)
    next_command = f"sopdeploy export {quote(str(folder / BEST))} --detach"
    next_step = insert_names("Next: {}", next_command, tag="code")
    if problem:
        next_step = f"{problem[0].upper()}{problem[1:]}."
    content = HtmlReport(
        title=setup.recipe.project or fit.name,
        **_head(result.score),
        warnings=[
            insert_folders(line, data_folder, folder) for line in run.record.get("warnings", ())
        ],
        text=[
            f"{score[0].upper()}{score[1:]}.",
            *(
                insert_folders(f"{line[0].upper()}{line[1:]}.", data_folder, folder)
                for line in notes
            ),
            next_step,
            insert_names("The prediction of each image: {}", PREDICTIONS, tag="code"),
        ],
        folded={f"{len(setup.labels)} classes": _list_names(setup.labels)}
        if len(setup.labels) > _MAX_CARDS
        else {},
        sections=sections,
    )

    page = folder / PAGE
    with writing(page), atomic_write(page) as partial:
        partial.write_text(render(content), encoding="utf-8")
    if not is_measured:
        return PageFacts([], (), ())
    if isinstance(metrics, MultiLabelReport):
        return PageFacts([], (), _score_classes(setup.data.train, metrics))
    classes = _score_classes(setup.data.train, metrics)
    return PageFacts(metrics.mistakes(), metrics.thresholds, classes)


def _head(score: Rate | MeanPrecision | float | None) -> dict[str, Any]:
    """Return the headline of a page, the *score*, with its interval to draw."""
    if isinstance(score, Rate):
        share, name = score.share, "accuracy"
    elif isinstance(score, MeanPrecision):
        share, name = score.value, "mAP"
    else:
        return {}
    return {"headline": f"{percent(share)} {name}", "bounds": (score.low, share, score.high)}


def _show_classes(
    train: LabeledImages, metrics: ClassificationReport | MultiLabelReport | None
) -> Section:
    """Show each class of *train*, its recall by *metrics* and sample photos, the lowest recall first."""
    recalls: dict[str, float | None] = {}
    for row in () if metrics is None else metrics.classes:
        recalls[row.label] = row.recall.share if isinstance(row.recall, Rate) else row.recall
    counts = dict(zip(train.labels, train.class_counts().tolist(), strict=True))

    def worst_first(label: str) -> float:
        recall = recalls.get(label)
        return 2.0 if recall is None else recall

    labels = sorted(train.labels, key=worst_first)
    cards = []
    for label in labels[:_MAX_CARDS]:
        column = train.labels.index(label)
        has_class_N = (
            train.targets[:, column] > 0 if train.is_multi_label else train.targets == column
        )
        members = np.flatnonzero(has_class_N)
        # The first image and the one in the middle, which are seldom copies.
        chosen = members[:: max(1, -(-len(members) // _SAMPLES))].tolist()
        photos = (_encode(train, index, _CARD_SIDE) for index in chosen)
        facts = amount(counts[label], "image")
        recall = recalls.get(label)
        if recall is not None:
            facts += f", recall {percent(recall, 0)}"
        cards.append(
            Card(title=label, text=facts, share=recall, images=[*filter(None, photos)])
        )

    more = len(labels) - len(cards)
    text = (
        [f"The {len(cards)} classes with the lowest recall, of {len(labels)}."] if more else []
    )
    return Section(title="Classes", text=text, cards=cards)


def _write_predictions(path: Path, predicted: Predictions, images: LabeledImages) -> None:
    """Write a row for each of *images*: its file, its class, and what is *predicted*, with probabilities."""
    rows: list[Sequence[object]]
    if isinstance(predicted, MultiLabelPredictions):
        header = ["file", "classes", *(f"probability of {label}" for label in images.labels)]
        rows = [
            (
                images.identity(index),
                "|".join(images.class_names(index)),
                *map("{:.4f}".format, row),
            )
            for index, row in enumerate(predicted.probabilities.tolist())
        ]
    else:
        header = [*ImagePrediction._fields]
        rows = [
            (
                images.identity(index),
                images.labels[score.target],
                images.labels[score.top5[0]],
                f"{score.confidence:.4f}",
                f"{score.likelihood:.4f}",
                "" if score.known is None else str(score.known).lower(),
            )
            for index, score in enumerate(predicted)
        ]
    with writing(path), atomic_write(path) as partial, partial.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def _encode(images: LabeledImages, index: int, side: int) -> str:
    """Encode an image, at most *side* pixels, as a JPEG in a `data:` URL; "" if its file cannot be read."""
    try:
        small = images.photo(index).pixels.copy()
    except DataError:
        return ""
    small.info.clear()  # Pillow would write the comment of the file
    small.thumbnail((side, side))
    encoded = io.BytesIO()
    small.save(encoded, "JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode('ascii')}"


def _score_classes(
    train: LabeledImages, metrics: ClassificationReport | MultiLabelReport
) -> tuple[ClassScore, ...]:
    """List precision and recall of each class with its number of images in *train*."""
    counts = dict(zip(train.labels, train.class_counts().tolist(), strict=True))
    scores = []
    for row in metrics.classes:
        recall = row.recall.share if isinstance(row.recall, Rate) else row.recall
        images = counts.get(row.label, 0)
        scores.append(
            ClassScore(label=row.label, images=images, precision=row.precision, recall=recall)
        )
    return tuple(scores)


def _describe_mistakes(
    predicted: Predictions,
    metrics: ClassificationReport | MultiLabelReport,
    images: LabeledImages,
    description: str,
) -> list[Section]:
    """Describe the predictions for *images*, which *description* names, and show the worst mistakes."""
    measured_on = f"{BEST} on {metrics.count} images: {description}."
    if not isinstance(metrics, ClassificationReport) or not isinstance(predicted, list):
        return [describe_predictions(metrics, measured_on)]

    # The confusion matrix and the classes stand beside the worst mistakes. Without a matrix, the bars of many classes
    # stand beside the frequent mistakes, and the photos have the whole width.
    frequent = _list_frequent(metrics)
    mistakes = _choose_mistakes(predicted, frequent)
    links = {cell: _name_mistake(cell) for cell in mistakes}
    worst = _show_mistakes(mistakes, predicted, images, _CONFUSED if frequent else _WORST)
    if bars := plot_recalls(metrics):
        tables = [tabulate_mistakes(metrics, links)]
        sections = [
            Section(
                title="Mistakes", text=[measured_on], figures=bars, tables=tables, divided=True
            ),
            worst,
            Section(
                title="Precision and recall", tables=[tabulate_classes(metrics)], folded=True
            ),
        ]
    else:
        text = [measured_on, *worst.text]
        tables = tabulate_matrix(metrics, links)
        sections = [
            Section(
                title="Mistakes", text=text, figures=worst.figures, tables=tables, divided=True
            ),
            Section(
                title="Precision and recall", tables=[tabulate_classes(metrics)], folded=True
            ),
        ]

    sections.append(replace(describe_thresholds(metrics, predicted), divided=True))
    sections.append(_show_rejected(predicted, images))
    return sections


def _list_names(labels: Sequence[str]) -> Any:
    """List the names of the classes, as markup."""
    return insert_names(", ".join(["{}"] * len(labels)), *labels)


def _show_rejected(scores: Sequence[ImageScore], images: LabeledImages) -> Section:
    """Show the *images* that `known` rejects although they show one of the classes."""
    captions = []
    for index, score in enumerate(scores):
        if score.known is False:
            label = images.labels[score.target]
            captions.append((index, insert_names("{}", label)))
    number = amount(len(captions), "image")
    text = insert_names(
        f"A server returns {{}} for {number} of {len(scores)} that show one of your classes.",
        "known: false",
        tag="code",
    )
    return _show_photographs(
        "Your images that count as unknown", text, images, captions[:_MAX_SHOWN]
    )


def _describe_training(setup: Setup, fit: Fit, procedure: str) -> Section:
    """Say what was trained, from which weights, on how many images, and by which *procedure*."""
    weights = "random weights"
    if setup.weights is not None:
        weights = f"the weights of {setup.weights.file} ({setup.weights.network})"

    num_images = len(setup.data.train)
    side = setup.recipe.preprocess.crop
    text = f"{fit.name}, trained from {weights} on {num_images} images, scaled to {side} x {side} pixels"
    seconds = f"{fit.position.seconds:.0f} s"
    return Section(title="Training", text=[f"{text}, {procedure}, in {seconds}."], folded=True)


def _list_runs_before(rows: Sequence[tuple[object, ...]]) -> Section:
    """List the runs before, a row for each."""
    table = Table(
        caption="Runs of this project in this folder, the newest first",
        columns=["date (UTC)", "run", "images", "classes", "accuracy"],
        rows=rows,
    )
    return Section(title="Runs before", tables=[table])


def _describe_decision(decision: Decision, labels: Sequence[str]) -> Section:
    """List what was fitted for the decision, and say what the values do."""
    sentences = [_DECISION]
    if decision.temperature != 1:
        sentences.append(_CALIBRATION)
    if decision.rejection is not None:
        sentences.append(_REJECTION)

    table = Table(caption="Fitted values", columns=["", ""], rows=decision.rows(labels))
    return Section(title="Decision", text=[" ".join(sentences)], tables=[table], folded=True)


def _predict_shown_images(
    setup: Setup, fit: Fit, description: str, on_image: Callable[[int, int], None]
) -> tuple[LabeledImages, str, NDArray[np.float64]]:
    """Return the images of the page, what they are, and their logits (N, C)."""
    held_out = setup.data.held_out
    recipe = setup.recipe
    if isinstance(fit, FewShotFit) and not len(held_out):
        description = (
            "the training images that the score counts, each predicted by a network that was "
            "fitted without it"
        )
        grouped = setup.data.train.replaced(groups=fit.groups)
        is_judged_N = np.zeros(len(grouped), np.bool_)
        is_judged_N[fit.judged if len(fit.judged) else slice(None)] = True
        return grouped.select(is_judged_N), description, fit.logits[is_judged_N]

    logits_NC = score_images(
        fit.network, recipe.preprocess, held_out, workers=recipe.workers, on_image=on_image
    )
    return held_out, description, logits_NC


def _describe_learning(
    history: Sequence[EpochRow], result: AnyProcedureResult, text: Sequence[str]
) -> Section:
    """Show the *text* of a result and, of a training loop, plots of losses and scores of all heads by epoch."""
    if not isinstance(result, LoopResult):
        return Section(title="Learning", text=text, folded=True)
    last = history[-1]
    score_name = last.metrics.score_name
    score_column = "map" if isinstance(last.metrics, MultiLabelMetrics) else "top1"

    # The names of training losses and heads in any epoch, each once: the keys of a dict keep
    # their order.
    losses = dict.fromkeys(loss for row in history for loss in row.losses)
    heads = dict.fromkeys(
        head for row in history if row.diagnostics for head in row.diagnostics.heads
    )

    shown_heads = heads if len(heads) > 1 else ()  # a single head is the exported network
    if shown_heads and last.diagnostics is not None:
        subset = (
            f"The exported network is evaluated on all {last.metrics.count} validation images, and each "
            f"head on the same {last.diagnostics.num_images} of them."
        )
        text = [*text, subset]

    def plot_columns(label: str, column_by_curve: Mapping[str, str], caption: str) -> Figure:
        curves = {
            curve: history_curve(history, column) for curve, column in column_by_curve.items()
        }
        return Figure(image=plot(curves, "epoch", label), caption=caption)

    scores = {"exported": score_column} | {
        head: f"{head}_{score_column}" for head in shown_heads
    }
    held_out_losses = {"exported": "loss"} | {head: f"{head}_loss" for head in shown_heads}
    overconfident = (
        f"If the loss rises and {score_name} does not fall, the network is overconfident."
    )

    figures = [
        plot_columns(
            "training loss", {loss: f"train_{loss}" for loss in losses}, _TRAINING_LOSSES
        ),
        plot_columns(score_name, scores, f"{score_name} on validation images."),
        plot_columns("loss on validation images", held_out_losses, overconfident),
    ]

    if counts := last.component_counts:
        figures.append(
            component_chart(counts, "Training images that the gate sent to each component")
        )
    return Section(title="Learning", text=text, figures=figures)


def _list_frequent(metrics: ClassificationReport | MultiLabelReport) -> list[tuple[int, int]]:
    """List the most frequent mistakes, true and predicted class, of more classes than a matrix shows."""
    if isinstance(metrics, MultiLabelReport) or len(metrics.classes) <= MAX_MATRIX_CLASSES:
        return []
    names = [row.label for row in metrics.classes]
    mistakes = metrics.mistakes()[:MAX_CONFUSIONS]
    return [(names.index(true), names.index(predicted)) for true, predicted, _ in mistakes]


def _choose_mistakes(
    predicted: Predictions, frequent: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], list[int]]:
    """Choose wrongly predicted images by (true class, predicted class), the most confident ones first.

    If pairs of classes are *frequent*, only their images are chosen, in this order of the pairs. Of
    the first `_MAX_CELLS` pairs, each has at least one image. None are chosen if images have
    several classes.
    """
    scores = [] if isinstance(predicted, MultiLabelPredictions) else predicted
    wrong = sorted(
        (-score.confidence, index) for index, score in enumerate(scores) if not score.correct
    )

    # A cell of the confusion matrix has a true and a predicted class.
    by_cell: dict[tuple[int, int], list[int]] = {}
    for _, index in wrong:
        cell = scores[index].target, scores[index].top5[0]
        by_cell.setdefault(cell, []).append(index)
    if frequent:
        by_cell = {cell: by_cell[cell] for cell in frequent}

    # Each cell shows its most confident mistake; the next most confident ones fill the page.
    first_of_cells = {indices[0] for indices in by_cell.values()}
    chosen = first_of_cells.union(*by_cell.values())
    others = [index for _, index in wrong if index in chosen - first_of_cells]
    num_others = max(0, _MAX_SHOWN - len(first_of_cells))
    shown = first_of_cells.union(others[:num_others])

    cells = list(by_cell.items())[:_MAX_CELLS]
    return {cell: [index for index in indices if index in shown] for cell, indices in cells}


def _name_mistake(cell: tuple[int, int]) -> str:
    return "mistake-{}-{}".format(*cell)


def _show_mistakes(
    mistakes: Mapping[tuple[int, int], Sequence[int]],
    predicted: Predictions,
    images: LabeledImages,
    text: str,
) -> Section:
    """Show the *images* of *mistakes*, by class and prediction, below *text*."""
    captions = []
    names = {}
    scores = predicted if isinstance(predicted, list) else []

    for cell, indices in mistakes.items():
        names[indices[0]] = _name_mistake(cell)
        for index in indices:
            score = scores[index]
            true = images.labels[score.target]
            other = images.labels[score.top5[0]]
            template = f"predicted as {{}} with {percent(score.confidence, 0)}, {{}} {percent(score.likelihood, 0)}"
            captions.append((index, insert_names(template, other, true)))

    return _show_photographs("Worst mistakes", text, images, captions, names)


def _show_wrong_labels(images: LabeledImages, fit: FewShotFit, command: str) -> Section:
    """Show the training *images* whose label is probably wrong by *fit*; *command* lists all."""
    wrong_labels = []
    if fit.label_logits is not None:
        wrong_labels = list_wrong_labels(fit.label_logits, images, fit.copies)
    captions = []
    for index, wrong in wrong_labels[:_MAX_SHOWN]:
        template = f"{{}} ({percent(wrong.probability)}), suggested: {{}} ({percent(wrong.probability_suggested)})"
        captions.append((index, insert_names(template, wrong.label, wrong.suggested)))

    text = insert_names(
        "Training images whose label contradicts the other images most, predicted by classifiers that were "
        "fitted without them and their copies. All: {}",
        command,
        tag="code",
    )
    return _show_photographs("Probably wrong labels", text, images, captions)


def _show_copies(images: LabeledImages, fit: FewShotFit) -> Section:
    """Show the largest groups of copies among training *images*."""
    group_N = fit.copies
    sizes = np.bincount(group_N)
    largest = [
        group for group in np.argsort(-sizes, kind="stable")[:_MAX_GROUPS] if sizes[group] > 1
    ]

    captions = []
    for number, group in enumerate(largest, 1):
        for index in np.flatnonzero(group_N == group)[:_MAX_COPIES].tolist():
            names = ", ".join(images.class_names(index))
            captions.append((index, insert_names(f"group {number}: {{}}", names)))

    text = "Training images that look like copies, the largest groups, never divided."
    return _show_photographs("Copies", text, images, captions)


def _show_photographs(
    title: str,
    text: str,
    images: LabeledImages,
    captions: list[tuple[int, Any]],
    names: Mapping[int, str] = MappingProxyType({}),
) -> Section:
    """Show the images of *captions*, (index, markup), as JPEGs; *names* are for links to them, by index.

    Those whose file is gone since, or cannot be read, are not shown.
    """
    figures = []
    for index, caption in captions:
        url = _encode(images, index, _SIDE)
        if not url:
            continue
        named = caption + ": " + insert_names("{}", images.identity(index))
        name = names.get(index, "")
        figures.append(Figure(image=url, caption=named, opens=True, name=name))
    return Section(title=title, text=[text] if figures else [], figures=figures)


def _describe_run(setup: Setup, fit: Fit, record: Mapping[str, Any]) -> list[Section]:
    """List the recipe and the environment of the run, in a section each."""
    values = []
    for key, value in flatten(setup.recipe.model_dump(mode="json")):
        # The config of the network is added below, as `network.`.
        is_hidden = key.startswith(("summary", "model.config."))
        if not is_hidden:
            values.append((key, value))
    values += flatten(fit.network.config.model_dump(mode="json"), "network.")

    recipe = Table(caption="All values of the run", columns=["key", "value"], rows=values)

    versions = {f"{name} version": version for name, version in record["versions"].items()}
    facts = versions | record["machine"]
    if isinstance(fit.result, LoopResult):
        facts["weights in best.pt"] = f"{record['weights']}, of epoch {record['epoch']}"

    machine = Table(
        caption="Versions and machine", columns=["what", "value"], rows=list(facts.items())
    )
    return [
        Section(title="Recipe", tables=[recipe], folded=True),
        Section(title="Environment", tables=[machine], folded=True),
    ]
