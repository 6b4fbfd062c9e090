"""A port for a server that cannot be told to take any and say which."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

HERE = "127.0.0.1"


@contextmanager
def held_port() -> Iterator[int]:
    """Give a port that nobody listens on and that the system gives to nobody else until the block ends.

    A port that is found and let go may be another's before the server comes. So this one stays bound, without
    listening: on Linux a server may share it that asks for `SO_REUSEADDR`, as servers do.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((HERE, 0))
        yield int(holder.getsockname()[1])
