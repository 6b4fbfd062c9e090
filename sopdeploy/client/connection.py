"""What both clients hold: the address, the key, and for how long and how often a request is tried."""

from typing import Any

import httpx

from sopdeploy.client.requests import BYTES, checked_url, headers
from sopdeploy.client.retry import Patience, Send
from sopdeploy.errors import ConfigError

FORM_FIELD = "image"
LONGEST_SECONDS = 86_400


class Connection:
    """The options of a client, checked."""

    def __init__(self, url: str, api_key: str | None, timeout: float, retries: int) -> None:
        """Take the options as a client got them; raises `ConfigError` where one is out of its range."""
        if retries < 0:
            raise ConfigError(f"retries={retries}: give 0 or more")
        self.url = checked_url(url)
        self.headers = headers(api_key)
        self._timeout = checked_seconds(timeout)
        self._retries = retries

    def patience(self, timeout: float | None) -> Patience:
        """Return how long a request that begins now is tried; raises `ConfigError`."""
        seconds = self._timeout if timeout is None else checked_seconds(timeout)
        return Patience(seconds=seconds, retries=self._retries)


def checked_seconds(timeout: float) -> float:
    """Return *timeout*; raises `ConfigError` where it is no length of time that a call may take."""
    if not 0 < timeout <= LONGEST_SECONDS:
        raise ConfigError(f"timeout={timeout}: give seconds, above 0 and at most {LONGEST_SECONDS}")
    return timeout


def request_options(what: Send) -> dict[str, Any]:
    """Return *what* as the arguments of `httpx`'s `request`."""
    files = [(FORM_FIELD, ("image", body, BYTES)) for body in what.form]
    return {
        "method": what.method,
        "url": what.path,
        "headers": dict(what.headers),
        "params": dict(what.params),
        "content": what.body,
        "files": files or None,
        "timeout": httpx.Timeout(what.seconds),
    }
