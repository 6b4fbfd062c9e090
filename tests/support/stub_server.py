"""A server in threads of this process that answers each request with bytes, for tests of clients."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import takewhile


@dataclass
class Received:
    """One request: the number of its connection, and its head and body."""

    connection: int
    head: bytes
    body: bytes


@dataclass
class StubServer:
    """The `url` of the server, and the requests that it has received."""

    url: str
    received: list[Received] = field(default_factory=list)


@dataclass
class Gate:
    """Responds as `respond` does, to the body `held` only when the test opens the gate.

    `asked` is set once this request has arrived.
    """

    respond: Callable[[Received], bytes]
    held: bytes = b"first"
    asked: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def __call__(self, request: Received) -> bytes:
        if request.body == self.held:
            self.asked.set()
            self.opened.wait(60)
        return self.respond(request)


def reply(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


@contextmanager
def stub_server(
    answer: Callable[[Received], bytes | None], port: int = 0
) -> Iterator[StubServer]:
    """Serve on *port*, or on any; a connection ends after None and `Connection: close`."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        server = StubServer(f"http://127.0.0.1:{listener.getsockname()[1]}")

        def serve(connection: socket.socket, number: int) -> None:
            with connection, connection.makefile("rb") as file, suppress(OSError):
                while head := b"".join(takewhile(lambda line: line != b"\r\n", file)):
                    lengths = [
                        line
                        for line in head.lower().splitlines()
                        if line.startswith(b"content-length:")
                    ]
                    size = int(lengths[0].partition(b":")[2]) if lengths else 0
                    server.received.append(Received(number, head, file.read(size)))
                    response = answer(server.received[-1])
                    if response is None:
                        return
                    connection.sendall(response)
                    if b"Connection: close" in response:
                        return

        def accept() -> None:
            with suppress(OSError):  # the block ends
                for number in range(10_000):
                    connection, _ = listener.accept()
                    threading.Thread(
                        target=serve, args=(connection, number), daemon=True
                    ).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield server
        finally:
            listener.shutdown(socket.SHUT_RDWR)
