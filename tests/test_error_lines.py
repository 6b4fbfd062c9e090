"""User errors end in one line with an error code, and external text is printed literally."""

import errno
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sopdeploy.cli.app import app
from sopdeploy.cli.console import one_line_errors, plain_text, print_error, print_field


def test_errors_print_their_code_and_return_it_as_json() -> None:
    result = CliRunner().invoke(app, ["verify", "nowhere", "--json"])
    assert result.exit_code == 2
    assert result.stderr.endswith(" [unusable_bundle]\n")
    error = json.loads(result.stdout)["error"]
    assert error["code"] == "unusable_bundle"
    assert error["message"] in result.stderr
    assert CliRunner().invoke(app, ["verify", "nowhere"]).stdout == ""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize(("file", "name"), [("bundles/x", "bundles/x"), (None, "a file")])
def test_storage_errors_are_one_line(
    file: str | None, name: str, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BaseException, match="2"), one_line_errors():
        raise OSError(number, os.strerror(number), file)
    line = capsys.readouterr().err
    assert line.startswith(f"error: {name}: cannot be read or written ({os.strerror(number)});")
    assert line.endswith("[no_storage]\n")


def test_other_system_errors_are_not_user_errors() -> None:
    with pytest.raises(ConnectionResetError), one_line_errors():
        raise ConnectionResetError(errno.ECONNRESET, "reset")


MARKUP = ["\\[.", "[bold]x[/]", "[/]", "\\[bold]x", "\\", ":dog:", "x\\", "[link=http://x]y", "{x}"]


@pytest.mark.parametrize("text", MARKUP)
def test_markup_in_external_text_is_printed_literally(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_error(text, "x[y]")
    print_field("label", text)
    captured = capsys.readouterr()
    assert (captured.err, captured.out) == (f"error: {text} [x[y]]\n", f"label    {text}\n")


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs", "Cc"]), max_size=30))
def test_external_text_is_one_line_without_control_characters(text: str) -> None:
    expected = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    assert plain_text(text).plain == expected
