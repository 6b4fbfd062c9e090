"""Commands on every page are valid. `test_page_commands` runs them."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.docs.reading import COMMANDS, PAGES, blocks, command_lines, name

ROOT_OPTIONS = {"--help", "-h", "--version", "--install-completion", "--show-completion"}
SHOWN = [(page, words) for page in PAGES for words in command_lines(page)]


def title(value: object) -> str:
    return (
        name(value)
        if isinstance(value, Path)
        else " ".join(value)
        if isinstance(value, list)
        else ""
    )


def resolve(words: list[str]) -> tuple[Any, list[str]]:
    """Resolve the (sub)command at the start of *words*; return it and the remaining words."""
    assert words[0] in COMMANDS.commands
    command = COMMANDS.commands[words[0]]
    rest = words[1:]
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


def test_each_training_of_a_page_can_be_typed_again() -> None:
    """A training in a folder that holds a run is an error, unless it continues this run."""
    trainings = [words for _, words in SHOWN if words[:1] == ["train"]]
    programs = [block for page in PAGES for block in blocks(page, "python")]

    assert len(trainings) >= 10
    assert [words for words in trainings if "--out" in words and "--resume" not in words] == []
    assert [program for program in programs if 'out="runs' in program] == []


def test_a_flag_that_may_be_repeated_may_be_in_every_command() -> None:
    waiting = list(COMMANDS.commands.values())
    repeated: defaultdict[str, set[bool]] = defaultdict(set)
    while waiting:
        command = waiting.pop()
        waiting += getattr(command, "commands", {}).values()
        for parameter in command.params:
            for flag in parameter.opts:
                repeated[flag].add(parameter.multiple)

    assert {"--set", "--option"} <= {
        flag for flag, kinds in repeated.items() if kinds == {True}
    }
    assert [flag for flag, kinds in repeated.items() if len(kinds) > 1] == []
