"""`sopdeploy health`: readiness check for containers."""

import http.client
import ssl
import urllib.request
from urllib.error import HTTPError
from urllib.parse import urlsplit, urlunsplit

from rich.text import Text

from sopdeploy.cli.command import command
from sopdeploy.cli.console import err, plain_text
from sopdeploy.errors import ConfigError
from sopdeploy_service.settings import load_settings

TIMEOUT = 3  # seconds for each step of the request
# Addresses on which a server listens, and where this machine reaches it
REACHED_AT = {"0.0.0.0": "127.0.0.1", "::": "::1", "*": "127.0.0.1"}  # noqa: S104
# How a response begins: a network that wants a login sends a page with status 200, too
START = b'{"status"'
NOT_READY = 1  # Docker reserves every other nonzero exit code of a health check


@command(examples=("sopdeploy health --url http://127.0.0.1:8000",))
def health(*, url: str | None = None) -> int:
    """Exit with 0 if a server is ready for requests, with 1 if it is not ready or does not respond.

    Args:
        url: URL of the server; by default this machine, with the host and the port of the environment or of
            the settings file that SOPDEPLOY_CONFIG names, as `serve` reads them. Options of `serve` are not
            known here: give the URL.
    """
    problem = _find_problem(url or _url_of_settings(), is_this_machine=url is None)
    if problem is None:
        return 0
    err.print(Text.assemble(("not ready:", "bold red"), " ", plain_text(problem)))
    return NOT_READY


def _url_of_settings() -> str:
    """Return the URL at which this machine reaches a server with the settings of the environment."""
    settings = load_settings()
    host = REACHED_AT.get(settings.host, settings.host)
    host = f"[{host}]" if ":" in host else host
    return f"{settings.scheme}://{host}:{settings.port}"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Lets a redirect be the response: another address may be ready when this one is not."""

    def http_error_302(self, *_: object, **__: object) -> None: ...

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _find_problem(url: str, *, is_this_machine: bool) -> str | None:
    """Return why the server at *url* is not ready, None if it is.

    A server on this machine may have any certificate: it has the name by which clients reach it.
    Others are requested through the proxy of the environment. Raises `ConfigError` for an invalid URL.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("it has no scheme or no host")
        handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
        if is_this_machine:
            handlers.append(urllib.request.ProxyHandler({}))
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            handlers.append(urllib.request.HTTPSHandler(context=context))

        ready = urlunsplit(
            (parts.scheme, parts.netloc, f"{parts.path.rstrip('/')}/readyz", "", "")
        )
        with urllib.request.build_opener(*handlers).open(ready, timeout=TIMEOUT) as response:
            if response.status != http.HTTPStatus.OK:
                return f"{url}: {response.status}"

            if response.read(len(START)) != START:
                return f"{url}: 200, but not a sopdeploy response; check the URL"
            return None

    except HTTPError as response:
        return f"{url}: {response.code} {response.read(200).decode(errors='replace')}"
    # This comes before `ValueError`, because the error of an invalid certificate is both.
    except OSError as error:
        reason = getattr(error, "reason", error)
        return f"{url}: {str(reason) or type(reason).__name__}"
    except (ValueError, http.client.InvalidURL) as error:
        raise ConfigError(
            f"{url}: invalid URL ({error}); write it as http://HOST:PORT"
        ) from error
    except http.client.HTTPException as error:
        return f"{url}: {str(error) or type(error).__name__}"
