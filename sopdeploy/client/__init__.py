"""Blocking and asyncio clients of `sopdeploy serve`, which import neither torch nor the server."""

from sopdeploy.client.asynchronous import AsyncClient
from sopdeploy.client.requests import ImageLike
from sopdeploy.client.results import Classification, ClassProbability, Expert, ModelInfo, Problem, ServerInfo
from sopdeploy.client.synchronous import Client

__all__ = [
    "AsyncClient",
    "ClassProbability",
    "Classification",
    "Client",
    "Expert",
    "ImageLike",
    "ModelInfo",
    "Problem",
    "ServerInfo",
]
