"""Why an object store cannot be used, in words of this project: those of its client reach no user."""

import socket
from types import SimpleNamespace

import pytest

from sopdeploy.environment import describe_store_error


class ClientError(Exception):
    """An error of a client, with the response of the store as botocore, requests or aiohttp have it."""

    def __init__(self, **values: object) -> None:
        super().__init__("SECRET TEXT of another package")
        self.__dict__.update(values)


class NoCredentialsError(Exception):
    pass


class ClientConnectorCertificateError(Exception):
    pass


class EndpointConnectionError(Exception):
    pass


def caused_by(cause: Exception, error: Exception | None = None) -> Exception:
    error = error or ClientError()
    error.__cause__ = cause
    return error


ERRORS = {
    "botocore": (
        ClientError(response={"ResponseMetadata": {"HTTPStatusCode": 403}}),
        "access is denied",
    ),
    "requests": (ClientError(response=SimpleNamespace(status_code=401)), "needs credentials"),
    "aiohttp": (ClientError(status=503), "responds with status 503"),
    "a missing key": (FileNotFoundError("SECRET TEXT"), "not found"),
    "a wrapped missing key": (
        caused_by(ClientError(status=404), OSError("SECRET TEXT")),
        "not found",
    ),
    "no right": (PermissionError("SECRET TEXT"), "access is denied"),
    "no answer": (caused_by(TimeoutError()), "does not respond in time"),
    "a closed port": (caused_by(ConnectionRefusedError()), "cannot be reached"),
    "an unknown host": (caused_by(socket.gaierror(-2, "SECRET TEXT")), "its host is not known"),
    "no key": (NoCredentialsError("SECRET TEXT"), "needs credentials"),
    "a certificate": (
        ClientConnectorCertificateError("SECRET TEXT"),
        "its certificate is not accepted",
    ),
    "no connection": (EndpointConnectionError("SECRET TEXT"), "cannot be reached"),
    "a full disk": (OSError(28, "SECRET TEXT"), "No space left on device"),
    "anything else": (ClientError(), "its client fails"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_a_store_is_described_by_its_status_or_type(name: str) -> None:
    error, reason = ERRORS[name]
    assert describe_store_error(error) == f"{reason} ({type(error).__name__})"
