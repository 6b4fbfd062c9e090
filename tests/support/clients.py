"""Both clients of a server behind one interface, so that every test runs with each of them."""

import asyncio
from typing import Any, Self

from sopdeploy.client import AsyncClient, Client


class AwaitedClient:
    """An `AsyncClient` with the blocking methods of `Client`, which run in one event loop."""

    def __init__(self, url: str, **options: Any) -> None:
        self._client = AsyncClient(url, **options)
        self._runner = asyncio.Runner()

    def classify(self, *arguments: Any, **options: Any) -> Any:
        return self._runner.run(self._client.classify(*arguments, **options))

    def embed(self, *arguments: Any, **options: Any) -> Any:
        return self._runner.run(self._client.embed(*arguments, **options))

    def info(self, **options: Any) -> Any:
        return self._runner.run(self._client.info(**options))

    def close(self) -> None:
        self._runner.run(self._client.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._runner.close()


CLIENTS = (Client, AwaitedClient)
