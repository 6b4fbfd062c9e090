"""`sopdeploy health`: readiness check for containers; imports only the standard library and typer."""

import http.client
import os
from contextlib import closing
from urllib.parse import urlsplit

from rich.text import Text

from sopdeploy.cli.command import command
from sopdeploy.cli.console import err, plain_text
from sopdeploy.errors import ConfigError

TIMEOUT = 3  # seconds for each step of the request
NOT_READY = 1  # Docker reserves every other nonzero exit code of a health check


@command()
def health(*, url: str | None = None) -> int:
    """Exit with 0 if a server is ready for requests, with 1 if it is not ready or does not respond.

    Example: sopdeploy health --url http://127.0.0.1:8000

    Args:
        url: URL of the server; by default this machine, port SOPDEPLOY_PORT or 8000.
    """
    server = url or f"http://127.0.0.1:{os.environ.get('SOPDEPLOY_PORT', '8000')}"
    problem = _find_problem(server)
    if problem is None:
        return 0
    err.print(Text.assemble(("not ready:", "bold red"), " ", plain_text(f"{server}: {problem}")))
    return NOT_READY


def _find_problem(url: str) -> str | None:
    """Return why the server at *url* is not ready, None if it is; raises `ConfigError` for an invalid URL."""
    try:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("it has no scheme or no host")
        is_secure = parts.scheme == "https"
        connect = http.client.HTTPSConnection if is_secure else http.client.HTTPConnection
        with closing(connect(parts.hostname, parts.port, timeout=TIMEOUT)) as connection:
            connection.request("GET", parts.path.rstrip("/") + "/readyz")
            response = connection.getresponse()
            body = response.read(200).decode(errors="replace")
    except OSError as error:  # before `ValueError`, because the error of an invalid certificate is both
        return str(error) or type(error).__name__
    except (ValueError, http.client.InvalidURL) as error:
        raise ConfigError(f"{url}: invalid URL ({error}); write it as http://HOST:PORT") from error
    except http.client.HTTPException as error:
        return str(error) or type(error).__name__
    return None if response.status == http.HTTPStatus.OK else f"{response.status} {body}"
