"""The command line: help, completion, JSON output, one-line errors, and `sopdeploy env`."""

import errno
import io
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner, Result

import sopdeploy
from sopdeploy.cli.console import (
    ProgressBars,
    one_line_errors,
    plain_text,
    print_error,
    print_field,
    print_table,
    show_steps,
)
from sopdeploy.models.registry import CATALOG, FAMILIES
from sopdeploy.report.wrong_labels import WrongLabel
from sopdeploy.training.settings.recipe_files import list_recipes
from sopdeploy_commands import env
from sopdeploy_commands.app import app

ROOT = Path(sopdeploy.__file__).parents[1]
COMMANDS: Any = get_command(app)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sopdeploy_cli(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def in_process(
    *arguments: str, program: tuple[str, ...] = ("-m", "sopdeploy"), **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run `sopdeploy` in a new process with buffered stdout; *options* are those of `subprocess.run`."""
    variables = {
        name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"
    }
    options = {"stdout": subprocess.PIPE, "env": variables, **options}
    return subprocess.run(
        [sys.executable, *program, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        **options,
    )


def as_json(*arguments: str) -> Any:
    result = sopdeploy_cli(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return json.loads(result.stdout)


def error_line(*arguments: str) -> str:
    """Run a command that must fail with one error line and write nothing; return the line."""
    result = sopdeploy_cli(*arguments)
    assert result.exit_code == 2, result.output or repr(result.exception)
    assert result.stdout == ""
    assert result.stderr[:7] == "error: "
    assert result.stderr.count("\n") == 1
    assert list(Path.cwd().iterdir()) == []
    return result.stderr


@pytest.mark.parametrize("command", COMMANDS.commands)
def test_every_command_documents_its_options_and_shows_an_example(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = sopdeploy_cli(command, "--help")
    assert result.exit_code == 0
    assert re.search(rf"Example:\s+sopdeploy {command}", result.stdout), result.stdout

    undocumented = [
        p.name for p in COMMANDS.commands[command].params if not getattr(p, "help", None)
    ]
    assert undocumented == []

    options = [
        name for p in COMMANDS.commands[command].params for name in p.opts if name[0] == "-"
    ]
    assert [name for name in options if name not in result.stdout] == []


def test_without_a_command_and_with_help_all_commands_are_listed() -> None:
    for arguments in ((), ("--help",), ("-h",)):
        result = sopdeploy_cli(*arguments)

        assert (result.exit_code, result.stderr) == (0, "")
        assert re.findall(r"^  ([a-z-]+) +[a-z]", result.stdout, re.MULTILINE) == list(
            COMMANDS.commands
        )
        assert max(map(len, result.stdout.splitlines())) <= 100


def test_shell_completion_suggests_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    words = {
        "COMP_WORDS": "sopdeploy ex",
        "COMP_CWORD": "1",
        "_SOPDEPLOY_COMPLETE": "complete_bash",
    }
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    suggestions = in_process(
        program=("-c", "from sopdeploy_commands.app import main; main()")
    ).stdout

    assert "export" in suggestions
    assert not any(text in suggestions for text in ("train", "\x1b", "[bold]"))


def test_the_module_prints_the_package_version() -> None:
    for arguments in (("--version",), ("--version", "exprt"), ("--version", "--help")):
        assert in_process(*arguments).stdout == f"sopdeploy {sopdeploy.__version__}\n"


@pytest.mark.skipif(
    not str(ROOT).isascii(),
    reason="in this locale, Python cannot read the .pth file with the path of this checkout",
)
def test_the_program_restarts_once_in_utf_8_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}.items():
        monkeypatch.setenv(name, value)
    for options in ((), ("-X", "utf8=0")):  # the option has priority over the variable
        done = in_process("--version", program=(*options, "-m", "sopdeploy"), timeout=120)
        assert (done.returncode, done.stderr) == (0, "")


def test_models_lists_the_catalog_by_family() -> None:
    result = as_json("models")
    of_papers = ["psdr-resnet50", "psdr-resnet50-no-aux", "lrbp-vgg16"]
    assert [row["name"] for row in result] == [*CATALOG, *of_papers]
    assert all(row["summary"] for row in result)

    lines = sopdeploy_cli("models").stdout.splitlines()
    assert max(map(len, lines)) <= 160
    assert set(CATALOG) <= {line.split()[0] for line in lines if line}
    for title, entries in FAMILIES:
        assert lines[lines.index(title) + 1].split()[0] == next(iter(entries))


def test_models_describes_a_network_with_given_options() -> None:
    short = as_json(
        "models",
        "resnet20",
        "--option",
        "pooling=isqrt",
        "--num-classes",
        "7",
        "--image-size",
        "24",
    )

    assert short["config"]["pooling"]["kind"] == "isqrt"
    assert (short["num_classes"], short["image_size"]) == (7, 24)
    printed = (
        CliRunner().invoke(app, ["models", "resnet20", "--option", "pooling=isqrt"]).stdout
    )

    assert re.search("^options: .*pooling=isqrt", printed, re.MULTILINE)
    strided = CliRunner().invoke(app, ["models", "dsop-resnet18"]).stdout
    assert "3.05 G" in strided


def test_recipes_lists_every_recipe() -> None:
    text = sopdeploy_cli("recipes").stdout
    assert all(name in text for name in list_recipes())


INVALID: dict[str, tuple[tuple[str, ...], str]] = {
    "options of no model": (("models", "--num-classes", "7"), "no network"),
    "train without data or recipe": (("train",), "--data or --recipe"),
    "batch size zero": (("export", "c.pt", "--max-batch", "0"), "--max-batch: "),
    "a port out of range": (("serve", "bundle", "--port", "99999"), "port"),
    "a mistyped command": (("exprt",), r"'exprt'; .* export\?;"),
    "a mistyped option": (("models", "--jsn"), "sopdeploy models: .*--json"),
    "a mistyped option of the program": (("--verison",), "--version"),
    "a missing argument": (("export",), "'CHECKPOINT'"),
    "photographs as an argument": (("train", "photos"), "--data photos"),
    "an empty folder name": (("train", "--data", ""), "--data: "),
    "an empty value of an option": (("train", "--data="), "--data: "),
    "an empty argument": (("label", ""), "first argument: "),
    "a recipe as an argument": (("train", "a.toml"), "--recipe a.toml"),
    "a mistyped setting": (("serve", "bundle", "--setting", "prot=1"), "prot: .* port"),
    "a link in no folder": (("promote", "x", "--over", "a/live", "--force", "y"), "a/live: "),
    "no source to classify": (("classify", "bundle", "x", "--out", "x"), "--out x: "),
    "a path with markup": (("verify", "[bold]x[/]"), re.escape("[bold]x[/]: ")),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_input_is_one_error_line(case: str) -> None:
    arguments, message = INVALID[case]
    assert re.search(message, error_line(*arguments))


def test_output_that_nobody_reads_is_not_an_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        done = in_process("--help", stdout=closed)

    assert (done.returncode, done.stderr) == (1, "")


# more than the buffer of stdout
LONG = f"serve x --print-config --setting engine_cache={'x' * 9000}"


@pytest.mark.parametrize("command", ["--help", LONG], ids=["short", "long"])
def test_output_to_a_full_disk_is_a_user_error(command: str) -> None:
    with Path("/dev/full").open("wb") as full:
        done = in_process(*command.split(), stdout=full)

    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "No space left" in done.stderr
    assert done.stderr.endswith("[no_storage]\n")


def test_a_training_shows_warnings_and_how_much_is_done() -> None:
    shown = io.StringIO()
    bars = ProgressBars(Console(file=shown))
    (task,) = bars.progress.tasks

    bars.on_warning("equal files")
    bars.on_stage(name="features", done=3, total=9)
    assert task.description == ""
    assert task.completed == 3
    assert task.total == 9
    assert task.fields["note"] == ""
    assert shown.getvalue().splitlines() == ["warning: equal files", "features"]

    bars.on_step_end(epoch=1, epochs=4, step=2, steps=10, loss=0.5)
    of_step = ("epoch 2/4", 13, 40, "loss 0.500")
    assert (task.description, task.completed, task.total, task.fields["note"]) == of_step

    bars.on_evaluation_batch(epoch=2, epochs=4, done=36)
    after = ("epoch 3/4", 13, 40, "36 validation images")
    assert (task.description, task.completed, task.total, task.fields["note"]) == after


def test_a_command_whose_output_is_closed_at_the_start_ends_as_usual() -> None:
    done = in_process("recipes", preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("closed", [(0,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_no_file_gets_the_number_of_a_standard_stream_that_was_closed(
    closed: tuple[int, ...],
) -> None:
    program = (
        "import os\nfrom sopdeploy_commands import app\n"
        # the number is the exit code
        "app.app = lambda **_: exit(os.open('x', os.O_CREAT))\napp.main()"
    )
    done = in_process(
        program=("-c", program), preexec_fn=lambda: [os.close(number) for number in closed]
    )

    assert done.returncode > 2


# A command and the function that Ctrl-C interrupts.
INTERRUPTED = {
    "train": ("train --recipe digits-plain", "sopdeploy.training.train.train_run"),
    "eval": ("eval x.pt --data photos", "sopdeploy_commands.evaluate.check_is_checkpoint"),
    "serve": ("serve x", "sopdeploy_service.server.process.run_server"),
}


@pytest.mark.parametrize("case", INTERRUPTED)
def test_ctrl_c_ends_a_command_with_one_line_and_130(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    command, function = INTERRUPTED[case]
    monkeypatch.setattr(function, interrupt)
    result = sopdeploy_cli(*command.split())
    assert result.exit_code == 130
    assert result.stdout == ""
    assert result.stderr == "stopped by Ctrl-C\n"
    assert list(Path.cwd().iterdir()) == []


BELOW_A_FILE = {
    "train": "train --recipe digits-plain --out file/run",
    "demo": "demo --out file/demo",
    "key": "key camera --keys file/keys.toml",
}


@pytest.mark.parametrize("command", BELOW_A_FILE)
def test_an_output_that_cannot_be_written_has_one_code_for_all_commands(command: str) -> None:
    Path("file").write_text("mine")
    result = sopdeploy_cli(*BELOW_A_FILE[command].split())

    assert (result.exit_code, result.stderr[-14:]) == (2, " [no_storage]\n"), result.output
    assert result.stderr.count("\n") == 1
    assert "file/" in result.stderr


def test_errors_print_their_code_and_return_it_as_json() -> None:
    result = sopdeploy_cli("verify", "nowhere", "--json")
    assert (result.exit_code, result.stderr[-19:]) == (2, " [unusable_bundle]\n")

    error = json.loads(result.stdout)["error"]
    assert error["code"] == "unusable_bundle"
    assert error["message"] in result.stderr
    assert sopdeploy_cli("verify", "nowhere").stdout == ""


@pytest.mark.parametrize(
    "words", ["verify", "models --jsn", "compare a b --data c --tolerance 99"]
)
def test_a_wrong_command_line_is_json_too(words: str) -> None:
    result = sopdeploy_cli(*words.split(), "--json")
    error = json.loads(result.stdout)["error"]

    assert (result.exit_code, error["code"]) == (2, "wrong_value")
    assert f"error: {error['message']} [wrong_value]\n" == result.stderr


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOENT, errno.ESTALE, errno.ENOTCONN])
@pytest.mark.parametrize(
    "command", ["eval b --data d", "verify b", "bench b", "predict b x.jpg"]
)
def test_a_bundle_that_the_system_cannot_read_is_one_line(
    command: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_status = Path.stat

    def fail(path: Path, **options: Any) -> os.stat_result:
        if path.name == "manifest.json":
            raise OSError(number, os.strerror(number), str(path))
        return read_status(path, **options)

    Path("b").mkdir()
    Path("x.jpg").write_bytes(b"")
    monkeypatch.setattr(Path, "stat", fail)
    result = sopdeploy_cli(*command.split())
    assert result.exit_code == 2, repr(result.exception)
    assert result.stderr.splitlines()[-1].startswith("error: b")  # after the steps


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
    ids=["Python", "CPU"],
)
def test_exhausted_memory_is_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BaseException, match="2"), one_line_errors():
        raise error

    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert type(error).__name__ in line
    assert line.endswith("[no_memory]\n")


MARKUP = ["[bold]x[/]", "\\[bold]x", "x\\", ":dog:"]


@pytest.mark.parametrize("text", MARKUP)
def test_markup_in_external_text_is_printed_literally(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    print_error(text, "x[y]")
    print_field("label", text)
    captured = capsys.readouterr()

    assert (captured.err, captured.out) == (f"error: {text} [x[y]]\n", f"label    {text}\n")


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs", "Cc"]), max_size=30))
def test_external_text_is_one_line_without_control_characters(text: str) -> None:
    expected = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    printed = plain_text(text).plain.translate(dict.fromkeys(map(ord, "\u2068\u2069")))

    assert " ".join(printed.split()) == expected
    assert printed.isprintable()


# Text: how it is printed
SPACED = {
    "removed  branches (45": "removed  branches (45",
    "  a  b.jpg  ": "  a  b.jpg",
    "one\n    two\t three\n": "one two three",
}


@pytest.mark.parametrize("text", SPACED)
def test_spaces_that_align_columns_stay_in_one_line(text: str) -> None:
    assert plain_text(text).plain == SPACED[text]


# Text: how it is printed; < and > stand for U+2068 and U+2069
ISOLATED = {
    "images: dress 10, قبعة 10": "images: dress 10, <قبعة> 10",
    "حذاء رياضي 3, כובע 2, قبعة_2 4": "<حذاء رياضي> 3, <כובע> 2, <قبعة_2> 4",
    "photos/قبعة/1.jpg: قبعة 0.9": "photos/قبعة/1.jpg: <قبعة> 0.9",
    "run `sopdeploy label kept صور`, قبعة": "run `sopdeploy label kept صور`, <قبعة>",
    "next: sopdeploy train --data صور": "next: sopdeploy train --data صور",
    "é 日本 10": "é 日本 10",
}


@pytest.mark.parametrize("text", ISOLATED)
def test_a_right_to_left_name_is_isolated_unless_it_may_be_copied(text: str) -> None:
    assert plain_text(text).plain.translate({0x2068: "<", 0x2069: ">"}) == ISOLATED[text]


# Command with a link that leads to itself: its error
LOOPS = {
    "promote loop --over live --force reason": "loop: ",
    "classify loop photos --out loop": "loop: ",
    "train --data one --out loop": "one: ",
    "train --data one --unknown loop --set epochs=2": "loop: ",
}


@pytest.mark.parametrize("command", LOOPS)
def test_a_link_that_leads_to_itself_is_one_line(command: str) -> None:
    Path("loop").symlink_to("loop")
    Path("one/a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save("one/a/0.png")
    result = sopdeploy_cli(*command.split())

    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), repr(result.exception)
    assert LOOPS[command] in result.stderr


def test_all_sections_are_printed() -> None:
    found = CliRunner().invoke(app, ["env"])
    assert (found.exit_code, found.stderr) == (0, "")

    lines = found.stdout.splitlines()
    sections = [line for line in lines if line[0] != " "]
    assert sections == ["versions", "machine", "accelerators", "plug-ins"]

    values = dict(line.split(maxsplit=1) for line in lines if line[0] == " ")
    assert values["sopdeploy"] == sopdeploy.__version__
    assert {"python", "numpy", "pydantic", "processor", "cores", "system", "release"} <= set(
        values
    )
    assert {"onnxruntime", "tensorrt"} <= set(values)
    assert ("openvino" in values) == (find_spec("openvino") is not None)


def test_the_tensorrt_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cuda:
        def gpu(self) -> "Cuda":
            return self

        name = "NVIDIA H200"

    trt = ModuleType("tensorrt")
    trt.__version__ = "11.4.0"
    monkeypatch.setattr(
        "sopdeploy_service.runtime.tensorrt_session.import_tensorrt", lambda: trt
    )
    monkeypatch.setattr("sopdeploy_service.runtime.tensorrt_session.open_cuda", Cuda)
    assert env.describe_accelerators()["tensorrt"] == "11.4.0 on NVIDIA H200"


def test_a_command_whose_output_is_redirected_prints_a_line_for_each_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with show_steps("export") as on_step:
        on_step("converting to ONNX")
        on_step("writing [the] bundle")

    assert capsys.readouterr() == (
        "",
        "export: converting to ONNX\nexport: writing [the] bundle\n",
    )


def test_a_row_of_a_table_is_one_line_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["photographs-of-the-second-week-3f6c01d2a4b7" * 5, "b"]
    print_table(("bundle", "accuracy"), [(name, "98.7 %") for name in names])

    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [
        [name, "98.7", "%"] for name in names
    ]


def test_a_probably_wrong_label_is_a_row_with_both_probabilities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = WrongLabel(
        file="hat/1.jpg",
        label="hat",
        suggested="shoe",
        probability=0.25,
        probability_suggested=0.5,
    )
    monkeypatch.setattr("sopdeploy.report.wrong_labels.find_wrong_labels", lambda *_: (wrong,))
    command = ["train", "--dry-run", "--data", str(tmp_path), "--wrong-labels", "runs/latest"]
    row = CliRunner().invoke(app, command).stdout.splitlines()[1]

    assert row.split() == ["hat/1.jpg", "hat", "25.0", "%", "shoe", "50.0", "%"]

    # Where labels cannot be judged, a line and a field say so.
    suspect = wrong.model_copy(update={"is_suspect": True})
    monkeypatch.setattr(
        "sopdeploy.report.wrong_labels.find_wrong_labels", lambda *_: (suspect,)
    )

    assert "contradicts most" in CliRunner().invoke(app, command).output
    [listed] = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert listed["is_suspect"]
