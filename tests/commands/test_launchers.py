"""Variables of launchers of several processes concern commands that run in several processes only."""

import socket

import pytest
from typer.testing import CliRunner

from sopdeploy_commands.app import app

VARIABLES = {
    "the second process": {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
    "no number": {"WORLD_SIZE": "many", "RANK": ""},
    "of Slurm": {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"},
}


@pytest.mark.parametrize("name", VARIABLES)
def test_a_command_for_one_process_shows_its_result_and_its_exit_code(name: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        for words, code in (
            (["health", "--url", f"http://127.0.0.1:{taken.getsockname()[1]}"], 1),
            (["models", "--json"], 0),
        ):
            alone = CliRunner().invoke(app, words, env=dict.fromkeys(VARIABLES[name]))
            found = CliRunner().invoke(app, words, env=VARIABLES[name])
            assert (found.exit_code, found.output) == (code, alone.output)
            assert found.output


def test_training_names_a_variable_that_is_not_a_number() -> None:
    words = ["train", "--recipe", "digits-dsop"]
    found = CliRunner().invoke(app, words, env=VARIABLES["no number"])

    assert (found.exit_code, found.stderr.count("\n")) == (2, 1)
    assert "WORLD_SIZE='many'" in found.stderr
