"""Read the documentation pages: command lines and code blocks."""

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

from typer.main import get_command

from sopdeploy_commands.app import app

ROOT = Path(__file__).parents[2]
COMMANDS: Any = get_command(app)
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(file: str) -> str:
    """Read *file* of the checkout."""
    return (ROOT / file).read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """List the contents of fenced blocks of *language* on *page*, dedented."""
    return blocks_of(page.read_text(encoding="utf-8"), language)


def blocks_of(text: str, language: str) -> list[str]:
    """List the contents of fenced blocks of *language* in *text*, dedented."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


BEFORE = r"(?:\$ |[A-Z_]+=\S+ )*"  # a prompt, settings in the environment
RUN = re.compile(
    rf"^ *{BEFORE}(?:(?:srun )?torchrun .*? -m )?(sopdeploy(?: .*)?)$", re.MULTILINE
)


def command_lines(page: Path) -> list[list[str]]:
    """List the arguments of each `sopdeploy` command line in code blocks of *page*."""
    return command_lines_of(page.read_text(encoding="utf-8"))


def command_lines_of(text: str) -> list[list[str]]:
    """List the arguments of each `sopdeploy` command line in code blocks of *text*."""
    text = text.replace("\\\n", " ")
    fenced = re.findall(r"^( *)```\w*\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}.*$", text, re.MULTILINE)
    code = "\n".join([*(block for _, block in fenced), *indented])
    typed = dict.fromkeys(line.strip() for line in RUN.findall(code))
    return [
        [word for word in shlex.split(line, comments=True)[1:] if word != "&"] for line in typed
    ]


def module_at(path: Path) -> Any:
    """Import the file at *path*, which belongs to no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
