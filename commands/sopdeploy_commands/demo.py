"""`sopdeploy demo`: the workflow on photographs and on digits, with the commands that a user would type."""

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO, cast

import typer

from sopdeploy.base.config import parse_json
from sopdeploy.base.files import BEST, LATEST, writing
from sopdeploy.bundle.manifest import CERTIFICATE
from sopdeploy.cli.command import command
from sopdeploy.cli.console import print_table, say
from sopdeploy.client import Classification, Client
from sopdeploy.errors import SopdeployError
from sopdeploy.evaluation.metrics import Rate
from sopdeploy_commands.app import QUICK_START

_PACKAGED = Path(__file__).parent / "photos"  # of a wheel
PHOTOS = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "examples" / "photos"
EXPORT = "export runs/latest/best.pt --detach"
PHOTOGRAPHS = "train --data photos/clothing"
DIGITS = "train --recipe digits-dsop"
SERVE = "serve bundles/latest --port 0"
MIN_ACCURACY = 0.8  # of the photographs, in cross-validation and over HTTP
MIN_REJECTED = 0.8  # of the photographs of other things
MIN_DIGITS = 0.98
_ROWS = 10  # predictions of digits to print
_TIMEOUT = 60  # seconds
_PROGRAM = (sys.executable, "-m", "sopdeploy")


@command(examples=("sopdeploy demo",))
def demo(*, out: Path = Path("demo")) -> None:
    """Train on packaged photos and on digits, export, serve and classify over HTTP, without internet.

    The photos are copied to OUT/photos. Every printed command also works in OUT, the commands for
    the digits in OUT/digits.

    Args:
        out: Folder of the photos, runs and bundles; created if it is missing.
    """
    with writing(out):
        shutil.copytree(
            PHOTOS, out / "photos", copy_function=shutil.copyfile, dirs_exist_ok=True
        )
        (out / "digits").mkdir(exist_ok=True)

    with ThreadPoolExecutor() as pool:  # a failure is told once both have ended
        digits = pool.submit(_prepare_digits, out / "digits")
        classify_photographs(out)
    show_digits(digits.result(), out / "digits")
    say("", f"Not run: {_describe_what_did_not_run()}")
    say("Next: use your own photos, in folders photos/<class>/*.jpg:", style="bold")
    # `serve` checks a bundle and classifies, too
    optional_steps = ("sopdeploy verify", "sopdeploy predict")
    say(*(line for line in QUICK_START if not line.startswith(optional_steps)))


def _describe_what_did_not_run() -> str:
    """Name what the demo leaves out on this machine, and why."""
    import torch

    if torch.cuda.is_available():
        return "TensorRT engines (`sopdeploy engine`) and the container"
    return "CUDA and TensorRT engines (PyTorch finds no NVIDIA GPU), and the container"


def classify_photographs(out: Path) -> None:
    """Train on fifty photographs of clothing, and classify others, and those of other things."""
    from sopdeploy.weights.checkpoint import read_checkpoint

    say(
        "Five kinds of clothing, ten photos each; without a GPU or the internet",
        style="bold",
    )
    _run(PHOTOGRAPHS, out)
    top1 = read_checkpoint(out / "runs" / LATEST / BEST).training["procedure"]["top1"]
    expect("the photos, in cross-validation", Rate.model_validate(top1), MIN_ACCURACY)

    _run(EXPORT, out)

    # Ask a server about photographs that it was not trained on, and about other things.
    new = sorted(out.glob("photos/new/*/*.jpg"))
    others = sorted(out.glob("photos/others/*.jpg"))
    say("", f"$ sopdeploy {SERVE}", style="bold cyan")
    with _serving(out) as (ready, client):
        say(ready)
        answers = client.classify(new)
        answers_to_others = client.classify(others)

    say("New photos, over HTTP:", style="bold")
    rate = _show_answers([photo.parent.name for photo in new], answers, len(new))
    expect("the new photos", rate, MIN_ACCURACY)

    say("Photos of other things, which are none of the classes:", style="bold")
    rows = [
        (
            photo.stem,
            answer.classes[0].label,
            f"{answer.score:.2f}",
            "known" if answer.known else "unknown",
        )
        for photo, answer in zip(others, answers_to_others, strict=True)
    ]
    print_table(("photo", "nearest class", "score", ""), rows)

    rejected = Rate.of(sum(answer.known is False for answer in answers_to_others), len(others))
    expect("photos of other things, as unknown,", rejected, MIN_REJECTED)


class _Prepared(NamedTuple):
    """What ran beside the photographs.

    Attributes:
        outputs: What each command printed.
        code: Exit code of the last command.
        truths: Classes of the held-out digits.
        answers: What the server answered for each of them.
    """

    outputs: dict[str, str]
    code: int
    truths: Sequence[str] = ()
    answers: Sequence[Classification] = ()


def _prepare_digits(out: Path) -> _Prepared:
    """Train digits with DSoP's branches in the folder *out*, export them, and ask a server for answers."""
    from sopdeploy.data.folders.libraries import open_digits

    outputs: dict[str, str] = {}
    for words in (DIGITS, EXPORT):
        command = [*_PROGRAM, *words.split()]
        done = subprocess.run(
            command,
            cwd=out,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        outputs[words] = done.stdout
        if done.returncode:
            return _Prepared(outputs, done.returncode)

    # A server classifies the held-out digits.
    digits = open_digits().held_out
    truths = [digits.class_names(index)[0] for index in range(len(digits))]
    with _serving(out) as (ready, client):
        answers = [client.classify(digits.read(index)) for index in range(len(digits))]
    return _Prepared({**outputs, SERVE: ready}, 0, truths, answers)


def show_digits(prepared: _Prepared, folder: Path) -> None:
    """Show what was *prepared* in *folder*, what was detached, and how many of the validation digits are right."""
    say(
        "Auxiliary branches: DSoP on digits; the export removes them, with proof",
        style="bold",
    )

    say("This ran in the folder digits, beside the photos:", style="bold")
    for words, output in prepared.outputs.items():
        say("", f"$ sopdeploy {words}", style="bold cyan")
        say(*output.splitlines())
    if prepared.code:
        raise typer.Exit(prepared.code)  # the command has printed its error

    say("", "What the export removed:", style="bold")
    print_table(("", "trained", "exported", "removed"), _count_detached(folder))

    say("Validation digits, over HTTP:", style="bold")
    rate = _show_answers(prepared.truths, prepared.answers, _ROWS)
    expect("the validation digits, which also selected the epoch,", rate, MIN_DIGITS)


def _count_detached(folder: Path) -> list[tuple[str, ...]]:
    """Count tensors, parameters and operations of the network in *folder*, as trained and in its bundle.

    The certificate lists the tensors. The operations are multiply-adds of convolutions and
    linear layers for one image.
    """
    from sopdeploy.bundle.folder import open_bundle
    from sopdeploy.models.describe import describe
    from sopdeploy.weights.checkpoint import read_checkpoint

    # What the certificate lists.
    bundle = open_bundle(folder / "bundles" / LATEST)
    certificate = parse_json(bundle.contents[CERTIFICATE])
    num_removed = len(certificate["removed"])
    num_kept = len(certificate["kept"]) + len(certificate["unreached"])

    # What the network computes.
    checkpoint = read_checkpoint(folder / "runs" / LATEST / BEST)
    counted = describe(
        checkpoint.model,
        image_size=checkpoint.preprocess.crop,
        num_classes=len(checkpoint.labels),
        **checkpoint.config,
    )

    trained = counted.training
    shipped = counted.shipped
    pairs = (
        ("tensors", num_kept + num_removed, num_kept),
        ("parameters", trained.parameters, shipped.parameters),
        ("multiply-adds per image", trained.macs, shipped.macs),
    )
    return [
        (what, f"{before:,}", f"{after:,}", f"{before - after:,}")
        for what, before, after in pairs
    ]


def _run(words: str, out: Path) -> None:
    """Run `sopdeploy WORDS` in the folder *out*, which must succeed."""
    say("", f"$ sopdeploy {words}", style="bold cyan")
    if code := subprocess.run([*_PROGRAM, *words.split()], cwd=out, check=False).returncode:
        raise typer.Exit(code)  # the command has printed its error


@contextmanager
def _serving(out: Path) -> Iterator[tuple[str, Client]]:
    """Serve the newest bundle in *out* while the block runs; give the server's first line, and a client."""
    with subprocess.Popen(
        [*_PROGRAM, *SERVE.split()], cwd=out, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            ready = cast(TextIO, server.stdout).readline().strip()
            if not ready:  # the server has printed its error
                raise typer.Exit(server.wait())

            # The second word is the URL
            with Client(ready.split()[1], timeout=_TIMEOUT) as client:
                yield ready, client
        finally:
            server.terminate()


def _show_answers(
    truths: Sequence[str], answers: Sequence[Classification], num_rows: int
) -> Rate:
    """Print the first answers beside the true classes, and return how many of all are right."""
    rows = []
    for truth, answer in zip(truths, answers, strict=True):
        best = answer.classes[0]
        mark = "correct" if best.label == truth else "wrong"
        rows.append((truth, best.label, f"{best.probability:.4f}", mark))

    print_table(("class", "prediction", "probability", ""), rows[:num_rows])
    return Rate.of(sum(row[-1] == "correct" for row in rows), len(rows))


def expect(what: str, rate: Rate, least: float) -> None:
    """Print the *rate* of right answers in the demo with its interval; raises an error if it is below *least*."""
    interval = f"95 % interval {100 * rate.low:.0f} to {100 * rate.high:.0f} %"
    say(f"{rate.right} of {rate.count} right: {what} {100 * rate.share:.1f} % ({interval})")
    if rate.share < least:
        raise SopdeployError(
            f"{what.rstrip(',')}: only {100 * rate.share:.1f} % are right, and at least "
            f"{100 * least:.0f} % are expected; check the installation with `sopdeploy env`"
        )
