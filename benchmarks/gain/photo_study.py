"""The study of second-order heads on photographs: recipes that start from the same ImageNet weights.

All arms but the frozen ones train the last stages of EfficientNet-Lite0 by their recipe, with the
same images and augmentation: for the same number of epochs, and for the CPU time in which average
pooling trains for twice as many. The sets that decide choose the learning rate of each arm, for all
sets.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from lowering import session_of
from measure import Result, markdown
from measure import compare as compare_times
from scipy.stats import t

from gain.execution import Line, Lines
from gain.paired import Paired
from gain.photos import PhotosConfig, recipe_of
from gain.report import accuracies, answers, compare
from gain.study import Study
from sopdeploy.models.registry import create_model

FROZEN, FROZEN_HEAD = "frozen, averages", "frozen, second-order statistics"
PLAIN = "average pooling"
ISQRT, GSOP, GMSOP, DSOP = "iSQRT-COV", "GSoP", "GM-SOP", "DSoP, detached"
# The recipes of second-order heads train the last stages; so does average pooling here.
TRAINED: dict[str, dict[str, Any]] = {
    PLAIN: {
        "network": "photos",
        "config": {"start.learn": "last_stages", "procedure.kind": "loop"},
    },
    # Revision 2: recipes whose new layers change pretrained ones less, or learn faster than these.
    ISQRT: {"network": "fine-tune-isqrt", "learning_rate": 3e-3, "revision": 2},
    GSOP: {"network": "fine-tune-gsop", "revision": 2},
    GMSOP: {"network": "fine-tune-gmsop", "revision": 2},
    DSOP: {"network": "fine-tune-dsop", "revision": 2},
}
# So many times the epochs take about the same CPU time.
EQUAL_TIME = {PLAIN: 2.0, ISQRT: 2.0, GSOP: 1.75, GMSOP: 1.5, DSOP: 1.25}


def longer(arm: str) -> str:
    """Name *arm* with the training that takes as long as twice the epochs of average pooling."""
    return f"{arm}, equal time"


def photo_study(name: str, folder: Path, given: argparse.Namespace, epochs: int) -> Study:
    """Build the study of a set after a training of *epochs*."""
    frozen: dict[str, dict[str, Any]] = {
        arm: {
            "network": "photos",
            "config": {"procedure.kind": "few_shot", "procedure.head": head},
            "epochs": 0,
            "learning_rate": 1e-2,
        }
        for arm, head in ((FROZEN, "gap"), (FROZEN_HEAD, "gap+isqrt"))
    }
    long = {
        longer(arm): {**values, "epochs": round(EQUAL_TIME[arm] * epochs)}
        for arm, values in TRAINED.items()
    }
    rate_of = {DSOP: PLAIN, longer(DSOP): PLAIN}
    return Study(
        name=f"{name}, {epochs} epochs",
        images=name,
        title=f"{given.per_class} photographs of each class, {given.side} pixels",
        seeds=tuple(range(given.draws)),
        template={
            "task": PhotosConfig(
                folder=folder.resolve(), per_class=given.per_class, side=given.side
            ),
            "epochs": epochs,
            "learning_rate": 3e-3,
        },
        arms={**frozen, **TRAINED, **long},
        reference=PLAIN,
        pairs=(
            (FROZEN_HEAD, FROZEN),
            *((longer(arm), longer(PLAIN)) for arm in TRAINED if arm != PLAIN),
        ),
        rates=(1e-3, 3e-3, 1e-2),
        search=(PLAIN, ISQRT, GSOP, GMSOP),
        rate_of={longer(arm): arm for arm in TRAINED} | rate_of,
        rates_for=f"photographs, {epochs} epochs",
        decides=name not in (given.confirm or ()),
    )


def photo_studies(given: argparse.Namespace) -> list[Study]:
    """Build the studies of all sets and lengths."""
    return [
        photo_study(name, folder, given, epochs)
        for epochs in given.epochs
        for name, folder in given.photos
    ]


def summary(studies: Sequence[Study], lines: Lines) -> str:
    """Build the table of all sets: mean accuracy, number of draws, and difference from another arm.

    A trained arm is compared with average pooling of the same length, second-order statistics of the
    frozen network with its averages. Draws count that are finished for both. The time is relative to
    average pooling, as the mean of all draws.
    """
    others = {longer(arm): longer(PLAIN) for arm in TRAINED} | {longer(PLAIN): PLAIN}
    others |= {arm: PLAIN for arm in TRAINED if arm != PLAIN} | {FROZEN_HEAD: FROZEN}
    rows = []
    for arm in studies[0].arms:
        other = others.get(arm)
        cells = []
        times = []
        parameters = 0
        for study in studies:
            finished = finished_runs(study, lines)
            ours = finished[arm]
            if not ours:
                cells.append("")
                continue
            parameters = next(iter(ours.values())).parameters
            cell = f"{statistics.fmean(accuracies([*ours.values()])):.1f} ({len(ours)})"

            common = ours.keys() & (finished[other].keys() if other else set())
            if other and common:
                seeds = sorted(common)
                gain = difference(
                    [ours[seed] for seed in seeds], [finished[other][seed] for seed in seeds]
                )
                cell += f", {gain.mean:+.1f} +- {gain.half:.1f}"
            cells.append(cell)

            if study.arms[arm].get("epochs", 1):
                plain = finished[PLAIN]
                times += [
                    ours[seed].seconds / plain[seed].seconds
                    for seed in ours.keys() & plain.keys()
                ]
        if not any(cells):
            continue
        time = f"{statistics.fmean(times):.2f}" if times else ""
        rows.append([arm, *cells, time, f"{parameters / 1e6:.2f}"])

    names = (study.images for study in studies)
    return markdown(("classifier", *names, "training time", "million parameters"), rows)


def finished_runs(study: Study, lines: Lines) -> dict[str, dict[int, Line]]:
    """Return the finished runs of each arm of *study*, by seed."""
    return {
        arm: {
            seed: line
            for seed in study.seeds
            if (line := lines.find((study.images, arm, study.run(arm, seed)))) is not None
        }
        for arm in study.arms
    }


def difference(ours: Sequence[Line], other: Sequence[Line]) -> Paired:
    """Compare the same draws of two arms; the interval of a single draw is over its test images."""
    gain = compare(ours, other)
    if gain.n > 1:
        return gain
    of_images = 100 * (answers(ours[0]) - answers(other[0]))
    of_images = of_images[np.isfinite(of_images)]
    half = float(
        t.ppf(0.975, len(of_images) - 1) * of_images.std(ddof=1) / len(of_images) ** 0.5
    )
    return replace(gain, half=half)


def latencies(given: argparse.Namespace) -> list[Result]:
    """Compare the exported network of each arm with average pooling: one image, one thread of ONNX Runtime."""
    config = PhotosConfig(folder=Path("photos"), side=given.side)
    images = torch.rand(1, 3, given.side, given.side)
    sides = {}
    for arm, values in TRAINED.items():
        model = recipe_of(config, values["network"], values.get("config", {})).model
        torch.manual_seed(0)
        network = create_model(model.name, num_classes=10, **model.config).inference_model()
        session = session_of(network, (images.expand(2, -1, -1, -1),))
        pixels = {session.get_inputs()[0].name: images.numpy()}
        sides[arm] = lambda session=session, pixels=pixels: session.run(None, pixels)

    return [
        compare_times(arm, PLAIN, side, sides[PLAIN], runs=41, warmups=3, clock=process_time)
        for arm, side in sides.items()
        if arm != PLAIN
    ]
