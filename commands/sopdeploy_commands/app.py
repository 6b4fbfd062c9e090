"""The `sopdeploy` command line. A command is imported when it runs, so that help and completion are fast."""

import os
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperCommand, TyperGroup

from sopdeploy.base.nearest import ask_for, did_you_mean
from sopdeploy.errors import ConfigError, with_hint
from sopdeploy.version import __version__

ABOUT = (
    "Train second-order image classifiers (DSoP, GSoP, GM-SOP), detach their auxiliary branches with proof, "
    "lower them to ONNX and TensorRT, and serve them with FastAPI."
)
FORMER = {"--setting": "--set", "--weights": "--pretrained"}  # names of options in 0.3.0
OUTPUT_CLOSED = 1  # the exit code of Typer and Rich if stdout is closed
INTERRUPTED = 130  # the exit code after Ctrl-C, as in a shell
UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # Typer does not export it
# Arguments of every `typer.Typer`
SETTINGS: Any = {
    "rich_markup_mode": None,  # tables of Rich cut the names of options
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
# Commands by topic: name of a command, its function (`.module` is one of this package),
# summary.
TOPICS = {
    "Train, export, serve": {
        "train": (".train:train", "train a network"),
        "export": (
            ".export:export",
            "write a bundle with the ONNX file; --detach removes auxiliary branches",
        ),
        "engine": (".engine:engine", "build the TensorRT engine of a bundle"),
        "verify": (".verify:verify", "check files and outputs of a bundle"),
        "predict": (".predict:predict", "classify images without a server"),
        "serve": (".serve:serve", "serve bundles over HTTP, with a web page"),
        "demo": (".demo:demo", "run the whole workflow on digits and packaged photos"),
    },
    "Networks and papers": {
        "models": (".list_models:models", "list the networks of the catalog, or count one"),
        "recipes": (".train:recipes", "list the packaged recipes"),
        "inspect": (
            ".inspect_network:inspect",
            "list parts of your network that have no effect",
        ),
        "import": (
            ".import_file:import_file",
            "convert published weights to a checkpoint",
        ),
        "reproduce": (
            "sopdeploy_papers.reproduce:reproduce",
            "train the rows of a paper's table",
        ),
    },
    "Improve": {
        "eval": (".evaluate:evaluate", "evaluate a checkpoint or a bundle"),
        "label": (
            ".label:label",
            "move images that Label Studio has labelled to their classes",
        ),
        "compare": (".compare:compare", "compare two bundles on images"),
        "promote": (".promote:promote", "make a bundle live, or go back"),
    },
    "Operate": {
        "classify": (
            ".classify.run:classify",
            "classify any number of images into parquet or CSV files",
        ),
        "bench": (".bench:bench", "measure latency and throughput of a bundle"),
        "key": (".serve:key", "create an API key for a server"),
        "health": (".health:health", "check whether a server is ready"),
        "triton": (".triton:triton", "add a bundle to a Triton model repository"),
        "env": (".env:env", "versions and hardware, for a bug report"),
    },
}
COMMANDS = {name: command for commands in TOPICS.values() for name, command in commands.items()}
QUICK_START = (
    "sopdeploy train --data photos",
    "sopdeploy export runs/latest/best.pt --detach",
    "sopdeploy verify bundles/latest",
    "sopdeploy predict bundles/latest photo.jpg",
    "sopdeploy serve bundles/latest",
)


class CommandLine(TyperCommand):
    """A command that rejects empty values, and explains arguments that it does not have.

    `keys` are the names that its `--set` takes, with their help; with `takes_settings`, it also takes settings of
    the service.
    """

    keys: Mapping[str, str] = {}
    takes_settings = False

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse *args*; raises the usage errors of Typer."""
        previous = "the first argument"
        args = [self._present_name(arg) for arg in args]

        # An empty value is probably a variable of the shell that is not set.
        for arg in args:
            name, equals, value = arg.partition("=")
            if name.startswith("--") and equals and not value:  # --data=
                ctx.fail(f"{name}: an empty value")
            if not arg:  # --data ""
                ctx.fail(f"{previous}: an empty value")
            previous = arg

        ctx.allow_extra_args = True  # surplus arguments are returned instead of rejected
        try:
            rest: list[str] = super().parse_args(ctx, args)
        except UsageError as error:
            vars(error)["ctx"] = ctx  # the parser of arguments does not know the command
            raise

        if rest:
            hint = ""
            if any("--data" in parameter.opts for parameter in self.params):
                option = "--recipe" if rest[0].endswith(".toml") else "--data"
                hint = f"; {ask_for(f'{option} {rest[0]}')}"
            ctx.fail(f"Unexpected argument '{rest[0]}'{hint}")

        return rest

    def _present_name(self, arg: str) -> str:
        """Replace a `FORMER` name at the beginning of *arg* if this command has the present one."""
        name, equals, value = arg.partition("=")
        present = FORMER.get(name, name)
        is_known = any(present in parameter.opts for parameter in self.params)
        return f"{present}{equals}{value}" if is_known else arg

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, each group of options below its heading."""
        sections: dict[str, list[Any]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
            title = getattr(parameter, "rich_help_panel", None) or usual
            if record := parameter.get_help_record(ctx):
                if title == "Arguments":  # without their type
                    record = (record[0].partition(" <")[0], record[1])
                sections.setdefault(title, []).append(record)

        if self.keys:
            sections["Keys of --set"] = list(self.keys.items())
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class Commands(Mapping[str, Any]):
    """The commands by name; a command is imported when it is looked up."""

    def __getitem__(self, name: str) -> Any:
        source, _summary = COMMANDS[name]
        module, _, function = source.partition(":")
        # `command` has set this attribute.
        run = getattr(import_module(module, __package__), function).run_command
        app = typer.Typer(add_completion=False, cls=Group, **SETTINGS)
        app.command(name, cls=CommandLine)(run)

        command: Any = typer.main.get_command(app)
        command.keys = run.keys
        command.takes_settings = run.takes_settings
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class Group(TyperGroup):
    """A group of commands that asks for the nearest one if a command is unknown."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that *args* begin with; raises the usage errors of Typer."""
        name = args[0]
        if name in self.commands or name.startswith("-"):
            return super().resolve_command(ctx, args)
        hint = did_you_mean(name, list(self.commands))
        if name == "help":
            of_command = args[1:2] if args[1:2] and args[1] in self.commands else []
            hint = f"run {' '.join([ctx.command_path, *of_command, '--help'])}"
        return ctx.fail(with_hint(f"No such command '{name}'", hint))


class Program(Group):
    """The group of all commands; its help lists them without importing them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: Any = Commands()

    def main(self, *arguments: Any, **settings: Any) -> None:
        """Run a command; a wrong command line is one error line, and with `--json` also JSON."""
        words = arguments[0] if arguments else settings.get("args")
        as_json = "--json" in (sys.argv[1:] if words is None else words)

        try:
            code = super().main(*arguments, **{**settings, "standalone_mode": False})
        except UsageError as error:
            code = _print_user_error(_to_config_error(error), as_json)
        except ImportError as error:  # of a command
            code = _print_user_error(error, as_json)

        sys.exit(code)

    def invoke(self, ctx: Any) -> Any:
        """Import and run the command; Ctrl-C ends it with one line."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            sys.stderr.write(f"{str(stop) or 'stopped by Ctrl-C'}\n")
            raise typer.Exit(INTERRUPTED) from None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write usage, quick start, commands by topic, and options as plain text."""
        formatter.write_usage(ctx.command_path, "COMMAND [ARGS]...")
        formatter.write("\n")
        formatter.write_text(ABOUT)
        formatter.write(
            "\nQuick start (`train --recipe digits-dsop` trains a DSoP network on digits):\n"
        )
        for number, command in enumerate(QUICK_START, 1):
            formatter.write(f"  {number}  {command}\n")

        for topic, commands in TOPICS.items():
            with formatter.section(topic):
                formatter.write_dl([(name, summary) for name, (_, summary) in commands.items()])
        records = [parameter.get_help_record(ctx) for parameter in self.get_params(ctx)]
        with formatter.section("Options"):
            formatter.write_dl([record for record in records if record])

        formatter.write(
            "\nsopdeploy COMMAND --help shows the options of a command and an example.\n"
        )


app = typer.Typer(name="sopdeploy", cls=Program, help=ABOUT, **SETTINGS)


def _show_version(requested: bool) -> None:
    if requested:
        sys.stdout.write(f"sopdeploy {__version__}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version."
        ),
    ] = False,
) -> None:
    """Show the help if no command is given."""
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")


def main() -> None:
    """Run the command line; exit with 1 if the reader of stdout has closed it, as `head` does.

    Any other failure to write to stdout, such as a full disk, is a user error. If stdout or
    stderr was closed before the start (`>&-`), its output is discarded.
    """
    # stdin, too: otherwise, the file opened for stdout would get the free number 0 of stdin. Number
    # 1 would stay free for the next file that is opened, and libraries, which write to number 1,
    # would write into that file.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115

    # On shared cores, spinning OpenMP threads slow each other down. Must be set before torch is
    # imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The search for plugins of pydantic reads the metadata of every installed package, which
    # takes 50 ms.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

    try:
        code = _run_and_flush()
    except BrokenPipeError:
        code = OUTPUT_CLOSED
    except Exception as error:  # a bug keeps its traceback, see `_print_user_error`
        code = _print_user_error(error)

    from sopdeploy.base.environment import exit_process

    # The interpreter flushes stdout again; what is still in the buffer goes nowhere and cannot
    # fail.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    exit_process(code)


def _run_and_flush() -> Any:
    """Run the command line, write the rest of its output, and return the exit code."""
    code: Any = 0
    try:
        app(prog_name="sopdeploy")
    except SystemExit as stop:
        code = stop.code

    try:
        sys.stdout.flush()  # the interpreter would do it too late to handle an error
    except OSError:
        # A command that failed has printed its own error, so this one is not shown.
        if not code:
            raise

    return code


def _to_config_error(error: Any) -> Exception:
    """Build the one-line error for a command line that Typer does not accept."""
    command = "sopdeploy" if error.ctx is None else error.ctx.command_path
    message = " ".join(error.format_message().split()).rstrip(".")
    parameters = [] if error.ctx is None else error.ctx.command.params
    name = getattr(error, "option_name", None)

    # The command does not have the option.
    if hasattr(error, "possibilities") and name is not None:
        hint = _suggest_option(name, error.ctx.command)
        message = with_hint(f"No such option: {name}", hint)
    elif name is not None:  # an option without a value, or one that takes none
        # Empty for `--help`, which is not a parameter of the command
        named = [parameter for parameter in parameters if name in parameter.opts]
        # The choices, if the parameter is a `Literal`
        choices = get_args(named[0].type_descriptor.annotation) if named else ()
        if choices and all(isinstance(choice, str) for choice in choices):
            message += f", one of {', '.join(choices)}"

    return ConfigError(f"{command}: {message}; see {command} --help")


def _suggest_option(name: str, command: Any) -> str:
    """Say which option, or which setting that an option takes, the unknown option *name* may mean; or ""."""
    options = {
        option.lstrip("-").replace("-", "_"): option
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("--")
    }

    # An option of the command may take more names: settings of a server, or values of a recipe.
    assignments: dict[str, str] = {}
    on_gpu = ""
    otherwise = ""
    keys = getattr(command, "keys", {})  # not of the group of all commands
    assign = "--set"
    if getattr(command, "takes_settings", False):
        from sopdeploy_service.settings import Settings

        assignments = {key: f"{assign} {key}=VALUE" for key in [*Settings.model_fields, *keys]}
        on_gpu = "runtime=onnxruntime-cuda"
        otherwise = "--print-config lists all settings"
    elif keys:
        assignments = {key: f"{assign} {key}=VALUE" for key in keys}
    elif "set" in options:
        from sopdeploy.training.settings.recipe import recipe_keys
        from sopdeploy.training.settings.recipe_files import SELECTORS

        assignments = {
            key: f"{assign} {SELECTORS.get(key, key)}=VALUE" for key in recipe_keys()
        }
        on_gpu = "device=cuda"

    # A word that means the GPU comes first: names of other things look like it.
    wanted = name.lstrip("-").replace("-", "_")
    if on_gpu and wanted in {"gpu", "gpus", "cuda"}:
        return f"use {assign} {on_gpu}"
    return did_you_mean(wanted, assignments | options, otherwise)


def _print_user_error(error: Exception, as_json: bool = False) -> int:
    """Print *error* as a command does, and return the exit code; raises it again if it is not a user error."""
    from sopdeploy.cli.console import one_line_errors

    try:
        with one_line_errors(as_json):
            raise error
    except typer.Exit as stop:
        return stop.exit_code
