"""Wrong options, paths and files are named with what to give, before torch is imported."""

import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from sopdeploy_commands.app import app
from tests.commands.test_app import in_process

# Command: its error
EARLY_MISTAKES = {
    "train --data one": "(a/ 1 image)",
    "train --data photos.zip": "photos.zip: an archive",
    "train --data nowhere": "nowhere: ",
    "train --data on": "did you mean one?",
    "train --data https://x.org/photos": "https:/x.org/photos: ",
    "help train": "sopdeploy train --help",
    "help trian": "sopdeploy --help",
    "eval nothing.pt --data one": "nothing.pt: ",
    "train --recipe digits-plian": "digits-plain",
    "train --data one --set epochs=2 --pretrained imagnet": "imagnet: ",
    "train --data one --set epochs=2 --from runs/1": "--from: runs/1: ",
    "train --data one --set epochs=2 --unknown nowhere": "nowhere: ",
    "train --data one --set epochs=2 --out photos.zip": "--out: photos.zip ",
    "import one/a/0.png --as resnet18": "one/a/0.png: ",
    "export one --detach": "sopdeploy train --data one",
    "export ckpt.pt --out photos.zip": "--out: photos.zip ",
    "export ckpt.pt --precision int8": "try --calibrate",
    "export ckpt.pt --precision fp16 --evaluate nowhere": "nowhere: ",
    "export ckpt.pt --precision int8 --calibrate nowhere": "nowhere: ",
    "export nothing.pt --detach": "nothing.pt: ",
    "export ckpt.pt --network net:Net --preprocess imagenet": "--network net:Net: ",
    "export ckpt.pt --network json:loads --plain net:Net": "--plain net:Net: ",
    "export ckpt.pt --network json:loads --labels names.txt": "names.txt ",
    "inspect ckpt.pt --network net.py:Net": "--network net.py:Net: ",
    "inspect ckpt.pt --network json:loads --option a": "a: write key=value",
    "inspect ckpt.pt --network json:loads": "--preprocess: missing",
}


# Runs each command line of stdin in a fork of a process that has imported what most of them
# import.
IN_FORKS = """
import json, os, sys
import sopdeploy.cli.command, sopdeploy.data.folders.folder, sopdeploy.training.settings.recipe
import sopdeploy_commands.export, sopdeploy_commands.train
from sopdeploy_commands.app import main
assert "torch" not in sys.modules
for number, words in enumerate(json.load(sys.stdin)):
    if (child := os.fork()) == 0:
        os.dup2(os.open(f"{number}.txt", os.O_CREAT | os.O_WRONLY), 2)
        sys.argv[1:] = words
        try:
            main()
        except SystemExit as stop:
            os._exit(9 if "torch" in sys.modules else stop.code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def early_mistakes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Run the commands; return the exit code and stderr of each."""
    folder = tmp_path_factory.mktemp("early")
    (folder / "one" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "one" / "a" / "0.png")
    (folder / "photos.zip").write_bytes(b"PK")
    with zipfile.ZipFile(folder / "ckpt.pt", "w") as checkpoint:
        checkpoint.writestr("ckpt/data.pkl", b"")
    lines = json.dumps([command.split() for command in EARLY_MISTAKES])
    done = in_process(program=("-c", IN_FORKS), cwd=folder, input=lines)

    assert done.returncode == 0, done.stderr
    texts = [
        (folder / f"{number}.txt").read_text("utf-8") for number in range(len(EARLY_MISTAKES))
    ]
    return dict(
        zip(EARLY_MISTAKES, zip(map(int, done.stdout.split()), texts, strict=True), strict=True)
    )


@pytest.mark.parametrize("command", EARLY_MISTAKES)
def test_a_wrong_path_or_folder_is_an_error_before_torch_is_imported(
    command: str, early_mistakes: dict[str, tuple[int, str]]
) -> None:
    code, stderr = early_mistakes[command]

    assert code == 2, stderr
    assert EARLY_MISTAKES[command] in stderr
    assert stderr.count("\n") == 1


USAGE = {
    "train --resume": "never, always, auto",
    "serve --port": "'--port'",
    "--help=1": "'--help'",
    "--version=1": "'--version'",
    "env .": "'.'",
    "env ...": "'...'",
    "serve b --gpu": "--set runtime=onnxruntime-cuda",
    "serve b --queue-size 3": "--set queue_size=VALUE",
    "predict b c --explain": "--set explain=VALUE",
    "predict b c --set explan=true": "mean explain?",
    "eval b --data c --set mirror=perhaps": "--set mirror=VALUE: ",
    "eval b --data c --set mirror=true --set mirror=perhaps": "--set mirror=VALUE: ",  # the last one
    "serve b --device cpu": "--devices",
    "serve b --zebra": "--zebra; --print-config",
    "train --threads 3": "--set threads=VALUE",
    "train --recipe digits-dsop --epochs 0": "digits-dsop: epochs: ",
    "train --recipe digits-dsop --lr x": "'--lr'",
    "train --recipe digits-dsop --model resnet18x": "'resnet18x'",
    "train --cuda": "--set device=cuda",
    "export a --gpu": "--gpu; see",
    "serve b --setting port": "port=VALUE",
    "serve b --setting root_path=a?b": "root_path: ",
    "serve b --devices x": "devices",
}


@pytest.mark.parametrize("words", USAGE)
def test_a_wrong_option_is_named_with_its_command_and_a_replacement(words: str) -> None:
    result = CliRunner().invoke(app, words.split())

    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert USAGE[words] in result.stderr
    assert "pattern" not in result.stderr


FOREIGN_FILES = {
    "net.py": ("import torch", "code, not weights"),
    "net.h5": ("\x89HDF", "Keras or TensorFlow"),
    "net.keras": ("PK", "Keras or TensorFlow"),
    "net.onnx": ("\x08", "a finished graph"),
    "net.plan": ("\x08", "a finished graph"),
    "net.safetensors": ("{", "`sopdeploy train`"),
    "net.py:Net": (None, "names code"),
    "package.net:Net": (None, "names code"),
}


@pytest.mark.parametrize("name", FOREIGN_FILES)
def test_a_file_of_another_program_is_named_with_what_to_give(
    name: str, tmp_path: Path
) -> None:
    content, message = FOREIGN_FILES[name]
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")

    for words in (["export", tmp_path / name], ["verify", tmp_path / name]):
        result = CliRunner().invoke(app, list(map(str, words)))
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert message in result.stderr
        assert "damaged" not in result.stderr
        if words[0] == "export":  # the code of a network helps with its weights only
            assert ("--network" in result.stderr) is (
                name in {"net.py", "net.safetensors", "net.py:Net", "package.net:Net"}
            )
