"""Does DSoP pay from scratch? A small ResNet on folders of small images, with and without its branches.

    python benchmarks/dsop_from_scratch.py --data DIR --out FILE [--side 20] [--width 8] [--epochs 12]
        [--seeds 3] [--arms NAME ...] [--report]

DIR has train/<class>/ and test/<class>/, such as CIFAR-10 as JPEG files. All images are resized to --side.
The arms are `resnet8`, `dsop-resnet8` with average pooling in its branches (Table VII's control) and with
iSQRT-COV, all with the paper's weights of the losses (0.1, 0.2, 0.3), and `resnet8` with iSQRT-COV in place
of its average. Test accuracies of the first three are those of the detached network. The arm "roots, kept"
is not trained: it is the last branch of "roots, detached", which a network keeps that is not detached.

Within a seed, all arms start from the same backbone and see the same batches, shifts and reflections. SGD
with Nesterov momentum, one epoch of warm-up, then half a cosine to 0: every run ends annealed. The figures
are those of the last epoch; nothing was selected on test images.

A line of --out is written after each run, and finished runs are not repeated: seed by seed, all arms of a
seed. --report prints the table of finished runs. Intervals are 95 % intervals of the difference, paired over
test images and seeds. One thread; times are CPU seconds of the training.
"""

import argparse
import math
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydantic
import torch
import torch.nn.functional as F
from gain.runs import decode_bits, describe_gain, encode_bits, mean_accuracy
from measure import existing, make_parser, one_line_errors
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from sopdeploy.base.config import FieldValues, StrictModel
from sopdeploy.models.base import Classifier, TrainingOutput
from sopdeploy.models.registry import create_model

PLAIN = "plain"
AVERAGES = "branches with averages"
ROOTS = "roots, detached"
KEPT = "roots, kept"  # the last branch of `ROOTS`
HEAD = "roots in place of the average"
ARMS: dict[str, tuple[str, FieldValues]] = {
    PLAIN: ("resnet8", {}),
    AVERAGES: ("dsop-resnet8", {"aux_pooling": "gap"}),
    ROOTS: ("dsop-resnet8", {}),
    HEAD: ("resnet8", {"pooling": "isqrt"}),
}
BATCH = 128  # images
RATE = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
CLIP = 5.0
WARMUP_EPOCHS = 1.0
MARGIN = 8  # an image is shifted by up to 1 / MARGIN of its side
EVALUATION_BATCH = 500


class Run(StrictModel):
    """What a run is, and its outcome: accuracies in percent, `right` with a bit for each test image (base64).

    `heads` and `train_heads` have the accuracies of the branches on test and on training images,
    `heads_right` the bits of the last branch, `losses` the mean training loss of the main head in
    each epoch. Training images are evaluated without augmentation. `seconds` is the CPU time of
    the training.
    """

    arm: str
    seed: int
    images: str
    side: int
    width: int
    epochs: int
    accuracy: float
    loss: float
    train_accuracy: float
    heads: dict[str, float] = pydantic.Field(default_factory=dict)
    train_heads: dict[str, float] = pydantic.Field(default_factory=dict)
    losses: tuple[float, ...]
    seconds: float
    count: int
    right: str
    last_branch_right: str = ""
    date: str


class Part(NamedTuple):
    """Images (N, 3, side, side) uint8 and their targets (N,)."""

    pixels: Tensor
    targets: Tensor


class Images(NamedTuple):
    """A set of images: its name and classes, its parts, and mean and deviation of its training pixels."""

    name: str
    labels: tuple[str, ...]
    train: Part
    test: Part
    mean: Tensor
    std: Tensor

    def normalize(self, pixels: Tensor) -> Tensor:
        """Normalize *pixels* (B, 3, side, side) uint8 to float32 in the memory format of the networks."""
        x = (pixels.float() - self.mean) / self.std
        return x.contiguous(memory_format=torch.channels_last)


def main(arguments: list[str]) -> int:
    """Run what is missing, and print the table."""
    given = parse_arguments(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    runs = read_runs(given.out)
    if not given.report:
        images = open_images(given.data, given.side)
        for seed in range(given.seeds):
            for arm in given.arms:
                case = (arm, seed, images.name, given.side, given.width, given.epochs)
                if any(case_of(run) == case for run in runs):
                    continue
                run = train(images, arm, seed, given.width, given.epochs)
                runs.append(run)
                with given.out.open("a", encoding="utf-8") as file:
                    file.write(run.model_dump_json(exclude_defaults=True) + "\n")
                print(
                    f"{arm} seed {seed}: test {run.accuracy:.2f} %, training {run.train_accuracy:.2f} %, "
                    f"branches {run.heads}, {run.seconds:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )

    print(build_table(runs))
    return 0


def case_of(run: Run) -> tuple[str, int, str, int, int, int]:
    """Return what tells *run* apart from other runs."""
    return run.arm, run.seed, run.images, run.side, run.width, run.epochs


def read_runs(path: Path) -> list[Run]:
    """Read the finished runs, none if the file does not exist."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Run.model_validate_json(line) for line in lines]


def open_images(folder: Path, side: int) -> Images:
    """Read all images in *folder*, resized to *side*."""
    labels = tuple(sorted(path.name for path in (folder / "train").iterdir()))
    train, test = (_read_part(folder / part, labels, side) for part in ("train", "test"))
    values = train.pixels.float()
    mean = values.mean((0, 2, 3), keepdim=True)
    std = values.std((0, 2, 3), keepdim=True)
    return Images(folder.name, labels, train, test, mean, std)


def _read_part(folder: Path, labels: tuple[str, ...], side: int) -> Part:
    pixels, targets = [], []
    for target, label in enumerate(labels):
        for path in sorted((folder / label).iterdir()):
            with Image.open(path) as image:
                small = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            pixels.append(np.asarray(small))
            targets.append(target)
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return Part(stacked, torch.tensor(targets))


def build(arm: str, num_classes: int, width: int, seed: int) -> Classifier:
    """Build the network of *arm*; backbones of all arms of a *seed* have equal weights."""
    torch.manual_seed(seed)
    backbone = create_model("resnet8", num_classes=num_classes, base_width=width).state_dict()
    name, options = ARMS[arm]
    network = create_model(name, num_classes=num_classes, base_width=width, **options)
    own = network.state_dict()
    shared = {key: value for key, value in backbone.items() if value.shape == own[key].shape}
    network.load_state_dict({**own, **shared})
    return network.to(memory_format=torch.channels_last)


def train(images: Images, arm: str, seed: int, width: int, epochs: int) -> Run:
    """Train the network of *arm*, and evaluate it."""
    network = build(arm, len(images.labels), width, seed)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=RATE,
        momentum=MOMENTUM,
        nesterov=True,
        weight_decay=WEIGHT_DECAY,
    )
    weights = network.loss_weights()
    random = np.random.default_rng(seed)  # of batches and augmentation
    count = len(images.train.targets)
    num_steps = count // BATCH
    margin = images.train.pixels.shape[2] // MARGIN
    padded = F.pad(images.train.pixels, (margin,) * 4)

    losses = []
    started = time.process_time()
    for epoch in range(epochs):
        network.train()
        order = random.permutation(count)
        shifts = random.integers(0, 2 * margin + 1, (count, 2))
        is_mirrored = random.random(count) < 0.5

        sum_of_losses = 0.0
        for step in range(num_steps):
            for group in optimizer.param_groups:
                group["lr"] = RATE * _schedule(epoch + step / num_steps, epochs)
            chosen = order[step * BATCH : (step + 1) * BATCH]
            pixels = augmented(padded, margin, chosen, shifts[chosen], is_mirrored[chosen])
            targets = images.train.targets[chosen]

            output = network(images.normalize(pixels))
            if not isinstance(output, TrainingOutput):
                output = TrainingOutput(output, branches={}, penalties={})
            main_loss = F.cross_entropy(output.logits, targets)
            loss = main_loss
            for name, logits in output.branches.items():
                loss = loss + weights[name] * F.cross_entropy(logits, targets)

            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            optimizer.step()
            sum_of_losses += float(main_loss.detach())
        losses.append(round(sum_of_losses / num_steps, 4))
    seconds = time.process_time() - started

    # `heads` computes the logits of all heads; the one that is exported is "main".
    test = _logits(network, images, images.test)
    learned = _logits(network, images, images.train)
    branches = [name for name in test if name != "main"]
    right = _right(test["main"], images.test)
    return Run(
        arm=arm,
        seed=seed,
        images=images.name,
        side=images.train.pixels.shape[2],
        width=width,
        epochs=epochs,
        accuracy=_percent(right),
        loss=round(float(F.cross_entropy(test["main"], images.test.targets)), 4),
        train_accuracy=_percent(_right(learned["main"], images.train)),
        heads={name: _percent(_right(test[name], images.test)) for name in branches},
        train_heads={name: _percent(_right(learned[name], images.train)) for name in branches},
        losses=tuple(losses),
        seconds=round(seconds, 1),
        count=len(right),
        right=encode_bits(right),
        last_branch_right=encode_bits(_right(test[branches[-1]], images.test))
        if branches
        else "",
        date=datetime.now(UTC).date().isoformat(),
    )


def _schedule(done: float, epochs: int) -> float:
    """Return the factor of the rate after *done* of *epochs*: a rise, then half a cosine."""
    rise = min(1.0, (done + 0.01) / WARMUP_EPOCHS)
    return rise * 0.5 * (1 + math.cos(math.pi * done / epochs))


def augmented(
    padded: Tensor,
    margin: int,
    chosen: NDArray[np.int64],
    shifts: NDArray[np.int64],
    is_mirrored: NDArray[np.bool_],
) -> Tensor:
    """Cut the images *chosen* out of *padded* (N, 3, h, w) at their *shifts* (B, 2), some of them mirrored.

    One gather for the whole batch: a loop over its images took as long as the plain network.
    """
    span = np.arange(padded.shape[2] - 2 * margin)
    rows = shifts[:, :1] + span  # (B, side)
    columns = shifts[:, 1:] + np.where(is_mirrored[:, None], span[::-1], span)
    cut = padded[chosen[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2)  # from (B, side, side, 3)


@torch.no_grad()
def _logits(network: Classifier, images: Images, part: Part) -> dict[str, Tensor]:
    """Compute the logits (N, K) of each head for the images of *part*."""
    network.eval()
    batches = [
        network.heads(images.normalize(pixels))
        for pixels in part.pixels.split(EVALUATION_BATCH)  # type: ignore[no-untyped-call]
    ]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _right(logits: Tensor, part: Part) -> NDArray[np.bool_]:
    right: NDArray[np.bool_] = (logits.argmax(dim=1) == part.targets).numpy()
    return right


def _percent(right: NDArray[np.bool_]) -> float:
    return round(100 * float(right.mean()), 3)


def build_table(runs: list[Run]) -> str:
    """Build a table for each kind of run: accuracies by arm, and gains over "plain" and over the control."""
    tables = []
    for kind in dict.fromkeys(case_of(run)[2:] for run in runs):
        name, side, width, epochs = kind
        of_kind = [run for run in runs if case_of(run)[2:] == kind]
        answers: dict[str, dict[int, NDArray[np.float64]]] = {}  # by arm and seed
        for run in of_kind:
            answers.setdefault(run.arm, {})[run.seed] = decode_bits(run.right)[: run.count]
            if run.arm == ROOTS:
                kept = decode_bits(run.last_branch_right)[: run.count]
                answers.setdefault(KEPT, {})[run.seed] = kept

        rows = [
            f"{name}, {side} pixels, width {width}, {epochs} epochs:",
            "",
            "| arm | test % | training % | gain over plain | gain over branches with averages | CPU s |",
            "|---|---|---|---|---|---|",
        ]
        for arm, by_seed in answers.items():
            own = [run for run in of_kind if run.arm == (ROOTS if arm == KEPT else arm)]
            learned = [
                list(run.train_heads.values())[-1] if arm == KEPT else run.train_accuracy
                for run in own
            ]
            cells = [
                f"{arm} ({len(own)})",
                f"{mean_accuracy(list(by_seed.values())):.2f}",
                f"{np.mean(learned):.1f}",
                *(
                    "" if arm == other else describe_gain(by_seed, answers.get(other, {}))
                    for other in (PLAIN, AVERAGES)
                ),
                f"{np.mean([run.seconds for run in own]):.0f}",
            ]
            rows.append(f"| {' | '.join(cells)} |")
        tables.append("\n".join(rows))
    return "\n\n".join(tables)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    add_option = parser.add_argument
    add_option("--data", type=existing, help="folder with train/ and test/")
    add_option("--out", type=Path, required=True, help="file with a line per finished run")
    add_option("--side", type=int, default=20, help="of the images in pixels (20)")
    add_option("--width", type=int, default=8, help="channels of the first stage (8)")
    add_option("--epochs", type=int, default=12, help="of each run (12)")
    add_option("--seeds", type=int, default=3, help="number of seeds (3)")
    add_option("--arms", choices=ARMS, nargs="+", default=[*ARMS], help="to train (all)")
    add_option("--report", action="store_true", help="print the finished runs, and run nothing")
    given = parser.parse_args(arguments)
    if not given.report and given.data is None:
        parser.error("--data is missing; give a folder with train/ and test/")
    return given


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(sys.argv[1:]))
