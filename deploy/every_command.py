"""Run every command and its `--help` in this installation.

A traceback is a failure, and so is a missing package without the code `not_installed` or
`no_runtime`, or torch, missing for a command that reads a bundle.

    python deploy/every_command.py BUNDLE

Prints a line per command: its exit code and its error. `make wheel-test` runs it in
environments with different extras, which contain nothing but sopdeploy.
"""

import os
import shutil
import sys
import tempfile
import traceback
import zipfile
from pathlib import Path

from PIL import Image
from typer.testing import CliRunner

import sopdeploy
from sopdeploy.errors import SopdeployError
from sopdeploy_commands.app import COMMANDS, app

# Arguments with which a command imports what it needs, and ends at once where everything is
# installed.
ARGUMENTS = {
    "demo": "--out file/demo",
    "env": "",
    "data": "check photos",
    "recipes": "",
    "models": "resnet20",
    "import": "ckpt.pt --as resnet18 --out-file imported.pt",
    "train": "--data photos --set procedure.absent=1",
    "eval": "bundle --data photos",
    "reproduce": "dsop-9a --rows absent",
    "export": "ckpt.pt",
    "inspect": "ckpt.pt --network builtins:absent --preprocess timm:resnet18",
    "verify": "bundle",
    "engine": "bundle",
    "triton": "bundle repository",
    "predict": "bundle photos/ant/1.png",
    "classify": "bundle photos --out rows",
    "compare": "bundle bundle --data photos",
    "promote": "bundle --over live",
    "serve": "bundle --keys absent",
    "label": "absent.csv kept",
    "health": "--url http://127.0.0.1:1",
    "key": "app --keys keys.toml",
    "bench": "bundle --batch 1",
}


def run(*command: str) -> str:
    """Run *command* and return its exit code and stderr; raises what a user would see as a traceback."""
    result = CliRunner().invoke(app, command)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception

    # An error is one line, beside those of the steps, which begin with the name of the command.
    lines = [
        line for line in result.stderr.splitlines() if not line.startswith(f"{command[0]}: ")
    ]
    if result.exit_code == 2 and len(lines) != 1:
        raise RuntimeError(f"more or less than one line: {result.stderr}")

    # A package that is missing has its code; bundles need no torch.
    if "is not installed" in result.stderr:
        if not result.stderr.endswith(("[not_installed]\n", "[no_runtime]\n")):
            raise RuntimeError(f"another code than that of a missing package: {result.stderr}")
        if "torch is" in result.stderr and command[1:2] == ("bundle",):
            raise RuntimeError(f"bundles need no torch: {result.stderr}")
    return f"{result.exit_code} {result.stderr.strip()}"


def get(name: str) -> str:
    """Get *name* from the Python API; return the error if it is one for users."""
    try:
        getattr(sopdeploy, name)
    except SopdeployError as error:
        return f"2 {error}"
    return "0"


def main(bundle: Path) -> int:
    """Run everything in an empty folder with a copy of *bundle*; return the number of failures."""
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        # The bundle, a damaged checkpoint, and photographs.
        shutil.copytree(bundle, Path(folder, "bundle"))
        os.chdir(folder)
        Path("file").touch()
        with zipfile.ZipFile("ckpt.pt", "w") as checkpoint:
            checkpoint.writestr("ckpt/data.pkl", b"damaged")
        for name in ("ant", "bee"):
            Path("photos", name).mkdir(parents=True)
            for number in (1, 2):
                Image.new("RGB", (32, 32)).save(Path("photos", name, f"{number}.png"))

        # Every command with arguments and with `--help`, and every public name.
        checks = [(name, run, (name, *ARGUMENTS[name].split())) for name in COMMANDS]
        checks += [(f"{name} --help", run, (name, "--help")) for name in COMMANDS]
        checks += [(f"sopdeploy.{name}", get, (name,)) for name in sopdeploy.__all__]
        for name, check, arguments in checks:
            try:
                sys.stdout.write(f"{name}: {check(*arguments)}\n")
            except Exception:
                failures += 1
                sys.stdout.write(f"{name}: failed\n{traceback.format_exc()}")
    return failures


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
