"""Wrong options, paths and files are named with what to give, before torch is imported."""

import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from sopdeploy_commands.app import app
from tests.commands.test_app import in_process

EARLY_MISTAKES = {  # command: its error
    "train --data one": "one: holds no class folders and no labels.csv (a/ 1 image)",
    "train --data photos.zip": "photos.zip: an archive, not a folder of photos; unpack it, and give a folder",
    "train --data nowhere": "nowhere: no such folder",
    "eval nothing.pt --data one": "nothing.pt: no such file",
    "train --recipe digits-plian": "did you mean digits-plain",
    "train --data one --set epochs=2 --pretrained imagnet": "imagnet: no such file; give a weight file, or",
    "train --data one --set epochs=2 --from runs/1": "--from: runs/1: no such run or bundle",
    "train --data one --set epochs=2 --unknown nowhere": "nowhere: no such folder",
    "train --data one --set epochs=2 --out photos.zip": "--out: photos.zip is a file; choose a folder",
    "import one/a/0.png --as resnet18": "one/a/0.png: not a weight file",
    "export one --detach": "one: photos, not a checkpoint; run: sopdeploy train --data one",
    "export ckpt.pt --out photos.zip": "--out: photos.zip is a file; choose a folder",
    "export ckpt.pt --precision int8": "--precision: int8 needs images to measure ranges on; try --calibrate",
    "export ckpt.pt --precision fp16 --evaluate nowhere": "nowhere: no such folder",
    "export ckpt.pt --precision int8 --calibrate nowhere": "nowhere: no such folder",
    "export nothing.pt --detach": "nothing.pt: no such file",
    "export ckpt.pt --network net:Net --preprocess imagenet": "--network net:Net: ",
    "export ckpt.pt --network json:loads --plain net:Net": "--plain net:Net: ",
    "export ckpt.pt --network json:loads --labels names.txt": "names.txt cannot be read",
    "inspect ckpt.pt --network net.py:Net": "--network net.py:Net: ",
    "inspect ckpt.pt --network json:loads --option a": "a: write key=value",
    "inspect ckpt.pt --network json:loads": "--preprocess: missing",
}


# Runs each command line of stdin in a fork of a process that has imported what most of them
# import.
IN_FORKS = """
import json, os, sys
import sopdeploy.cli.command, sopdeploy.photos.folder, sopdeploy.training.recipe
import sopdeploy_commands.bundles.export, sopdeploy_commands.training.train
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
    "train --resume": "sopdeploy train: Option '--resume' requires an argument, one of never, always, auto",
    "serve --port": "sopdeploy serve: Option '--port' requires an argument; see sopdeploy serve --help",
    "--help=1": "sopdeploy: Option '--help' does not take a value; see sopdeploy --help",
    "--version=1": "sopdeploy: Option '--version' does not take a value; see sopdeploy --help",
    "env .": "sopdeploy env: Unexpected argument '.';",
    "env ...": "sopdeploy env: Unexpected argument '...';",
    "serve b --gpu": "No such option: --gpu; use --set runtime=onnxruntime-cuda;",
    "serve b --queue-size 3": "No such option: --queue-size; did you mean --set queue_size=VALUE?;",
    "predict b c --explain": "No such option: --explain; did you mean --set explain=VALUE?;",
    "predict b c --set explan=true": "expected KEY=VALUE; did you mean explain?",
    "eval b --data c --set mirror=perhaps": "--set mirror=VALUE: ",
    "serve b --device cpu": "No such option: --device; did you mean --devices?;",
    "serve b --zebra": "No such option: --zebra; --print-config lists all settings;",
    "train --threads 3": "No such option: --threads; did you mean --set threads=VALUE?;",
    "train --recipe digits-dsop --epochs 0": "digits-dsop: epochs: ",
    "train --recipe digits-dsop --lr x": "Invalid value for '--lr'",
    "train --recipe digits-dsop --model resnet18x": "'resnet18x' is not in the catalog",
    "train --cuda": "No such option: --cuda; use --set device=cuda;",
    "export a --gpu": "sopdeploy export: No such option: --gpu; see sopdeploy export --help",
    "serve b --setting port": "port: give it a value, port=VALUE",
    "serve b --setting root_path=a?b": "root_path: ",
    "serve b --devices x": "devices",
}


@pytest.mark.parametrize("words", USAGE)
def test_a_wrong_option_is_named_with_its_command_and_what_does_the_same(words: str) -> None:
    result = CliRunner().invoke(app, words.split())
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert USAGE[words] in result.stderr
    assert "pattern" not in result.stderr


FOREIGN_FILES = {
    "net.py": ("import torch", "code, not weights"),
    "net.h5": ("\x89HDF", "Keras or TensorFlow"),
    "net.keras": ("PK", "Keras or TensorFlow"),
    "net.onnx": ("\x08", "a finished graph without the network"),
    "net.plan": ("\x08", "a finished graph without the network"),
    "net.safetensors": ("{", "no checkpoint of `sopdeploy train`"),
    "net.py:Net": (None, "names code, not a file"),
    "package.net:Net": (None, "names code, not a file"),
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
