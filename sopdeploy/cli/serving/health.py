"""`sopdeploy health`: is a server ready? For a container's health check, so it loads next to nothing."""

import http.client
import os
from typing import Annotated
from urllib.parse import urlsplit

import typer

from sopdeploy.cli.console import err, one_line_errors, plain
from sopdeploy.errors import ConfigError

NOT_READY = 1  # the only other exit code that Docker lets a health check have


def health(
    url: Annotated[
        str | None,
        typer.Option(help="The server. [dim]default this machine, at SOPDEPLOY_PORT or 8000[/dim]"),
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for the answer.")] = 3.0,
) -> None:
    """End with 0 where a server is ready for requests, with 1 where it is not or does not answer.

    Example: [bold]sopdeploy health --url http://127.0.0.1:8000[/bold]
    """
    with one_line_errors():
        place = url or f"http://127.0.0.1:{os.environ.get('SOPDEPLOY_PORT', '8000')}"
        problem = why_not_ready(place, timeout)
    if problem is not None:
        err.print(f"[bold red]not ready:[/] {plain(place)}: {plain(problem)}")
        raise typer.Exit(NOT_READY)


def why_not_ready(url: str, timeout: float) -> str | None:
    """Return why the server at *url* takes no requests now, or None where it does.

    *timeout* is in seconds, for each step of the request. Raises `ConfigError` for what is no http(s) URL.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as problem:
        raise ConfigError(f"{url}: no URL ({problem})") from problem
    if parts.scheme not in {"http", "https"} or not host:
        raise ConfigError(f"{url}: say http://HOST:PORT")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(host, port, timeout=timeout)
    try:
        connection.request("GET", parts.path.rstrip("/") + "/readyz")
        answer = connection.getresponse()
        body = answer.read(200).decode(errors="replace")
    except (OSError, http.client.HTTPException) as problem:
        return str(problem) or type(problem).__name__
    finally:
        connection.close()
    return None if answer.status == http.HTTPStatus.OK else f"{answer.status} {body}"
