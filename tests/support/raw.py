"""Raw HTTP over sockets, for requests that no regular client sends."""

import json
import socket
from typing import NamedTuple

import httpx

POST = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\n"
GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"
EXPECT = b"Expect: 100-continue\r\n"


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        return json.loads(self.body)["code"]


def post_of(body: bytes) -> bytes:
    """A request to classify *body*."""
    return (
        POST
        + f"Content-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )


def connect(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=60)


def read(wire: socket.socket, *, to_the_end: bool = True) -> Reply:
    """Read a response from *wire*; with *to_the_end* the server must close the connection after it."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = wire.recv(65_536)
        assert piece, f"closed after {data!r}"
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    while len(body) < int(headers["content-length"]):
        body += wire.recv(65_536)
    if to_the_end:
        assert headers["connection"] == "close"
        assert wire.recv(10) == b""
    return Reply(int(first.split()[1]), headers, body)


def count(client: httpx.Client, line: str) -> float:
    found = [
        x
        for x in client.get("/metrics").text.splitlines()
        if x.startswith(f"sopdeploy_{line} ")
    ]
    return float(found[0].split()[-1]) if found else 0.0
