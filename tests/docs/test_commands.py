"""Commands on every page are valid. `test_page_commands` runs them."""

from pathlib import Path
from typing import Any

import pytest

from tests.docs.reading import COMMANDS, PAGES, command_lines, name

ROOT_OPTIONS = {"--help", "-h", "--version", "--install-completion", "--show-completion"}
SHOWN = [(page, words) for page in PAGES for words in command_lines(page)]


def title(value: object) -> str:
    return name(value) if isinstance(value, Path) else " ".join(value) if isinstance(value, list) else ""


def resolve(words: list[str]) -> tuple[Any, list[str]]:
    """Resolve the (sub)command at the start of *words*; return it and the remaining words."""
    assert words[0] in COMMANDS.commands
    command, rest = COMMANDS.commands[words[0]], words[1:]
    while hasattr(command, "commands") and rest:
        assert rest[0] in command.commands
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


@pytest.mark.parametrize(("page", "words"), SHOWN, ids=title)
def test_a_shown_command_line_parses(page: Path, words: list[str]) -> None:
    command = words[0] if words else "--help"
    if command in ROOT_OPTIONS:
        assert words[1:] == []
        return
    command, rest = resolve(words)
    assert command.make_context(command, rest).args == []


MEANINGS = {  # flag: how its description begins in every command that has it
    "--calibrate": "Folder of images to calibrate int8",
    "--key": "Private key in a PEM file",
    "--option": "Option KEY=VALUE of the network",
    "--set": "Override a value of ",
    "--setting": "Any other setting of the service, NAME=VALUE",
    "--unknown": "Folder of images of none of the classes, which test ",
}


@pytest.mark.parametrize("flag", MEANINGS)
def test_a_flag_means_the_same_in_every_command(flag: str) -> None:
    parameters = [p for command in COMMANDS.commands.values() for p in command.params if flag in p.opts]
    assert parameters
    assert [p.help for p in parameters if not p.help.startswith(MEANINGS[flag])] == []
    assert len({p.multiple for p in parameters}) == 1
