"""Blocking and asyncio clients of `sopdeploy serve`, which import neither torch nor the server."""

from sopdeploy.client.clients import AsyncClient, Client
from sopdeploy.client.requests import ImageLike
from sopdeploy.client.results import Classification, Embedding
from sopdeploy.http_api import ClassProbability, Component, ModelInfo, Problem, ServerInfo

__all__ = [
    "AsyncClient",
    "ClassProbability",
    "Classification",
    "Client",
    "Component",
    "Embedding",
    "ImageLike",
    "ModelInfo",
    "Problem",
    "ServerInfo",
]
