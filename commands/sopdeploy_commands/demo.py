"""`sopdeploy demo`: train, export, verify and serve a small network with the commands a user would type."""

import subprocess
import sys
from pathlib import Path
from typing import TextIO, cast

from sopdeploy.cli.command import command
from sopdeploy.cli.console import print_table, say
from sopdeploy.errors import SopdeployError
from sopdeploy.files import writing
from sopdeploy_commands.app import QUICK_START

STEPS = (
    "train --recipe digits-dsop",
    "export runs/latest/best.pt --detach",
    "verify bundles/latest",
)
SERVE = "serve bundles/latest --port 0"
_ROWS = 10  # predictions to print
MIN_ACCURACY = 0.98
_TIMEOUT = 60  # seconds


@command()
def demo(*, out: Path = Path("demo")) -> int | None:
    """Train on handwritten digits, export, verify, serve and classify over HTTP in about a minute.

    Example: sopdeploy demo

    Args:
        out: Folder of the run and the bundle; created if it is missing.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    program = (sys.executable, "-m", "sopdeploy")
    for words in STEPS:
        say("", f"$ sopdeploy {words}", style="bold cyan")
        code = subprocess.run([*program, *words.split()], cwd=out, check=False).returncode
        if code:
            return code
    say("", f"$ sopdeploy {SERVE}", style="bold cyan")
    with subprocess.Popen([*program, *SERVE.split()], cwd=out, stdout=subprocess.PIPE, text=True) as server:
        try:
            ready = cast(TextIO, server.stdout).readline().strip()
            if not ready:  # the server has printed its error
                return server.wait()
            say(ready)
            accuracy = _classify_digits(ready.split()[1])  # the second word is the URL
        finally:
            server.terminate()
    if accuracy < MIN_ACCURACY:
        raise SopdeployError(
            f"only {100 * accuracy:.1f} % of the digits were classified correctly over HTTP, at least "
            f"{100 * MIN_ACCURACY:.0f} % are expected; check the installation with `sopdeploy env`"
        )
    say("Next: use your own photos, in folders photos/<class>/*.jpg:", style="bold")
    optional_steps = ("sopdeploy verify", "sopdeploy predict")  # `serve` checks a bundle and classifies, too
    say(*(line for line in QUICK_START if not line.startswith(optional_steps)))
    return None


def _classify_digits(url: str) -> float:
    """Classify every held-out digit over HTTP, print the first predictions and return the accuracy."""
    from sopdeploy.client import Client
    from sopdeploy.evaluation.metrics import Rate
    from sopdeploy.photos.libraries import open_digits

    digits = open_digits().held_out
    rows, correct = [], 0
    with Client(url, timeout=_TIMEOUT) as client:
        for index in range(len(digits)):
            best, truth = client.classify(digits.read(index)).classes[0], digits.class_names(index)[0]
            correct += best.label == truth
            mark = "correct" if best.label == truth else "wrong"
            rows.append((truth, best.label, f"{best.probability:.4f}", mark))
    print_table(("digit", "prediction", "probability", ""), rows[:_ROWS])
    rate = Rate.of(correct, len(digits))
    right = f"{correct} of {len(digits)} held-out digits classified correctly over HTTP"
    interval = f"95 % interval {100 * rate.low:.1f} to {100 * rate.high:.1f} %"
    say(f"{right}: {100 * rate.share:.2f} % ({interval}; too high: they also selected the epoch)")
    return rate.share
