"""A client of `sopdeploy serve`, to block on or to await; needs no torch and nothing of the server."""

from sopdeploy.client.asynchronous import AsyncClient
from sopdeploy.client.images import Picture
from sopdeploy.client.results import Classification, ClassProbability, Expert, ModelInfo, Problem, ServerInfo
from sopdeploy.client.synchronous import Client

__all__ = [
    "AsyncClient",
    "ClassProbability",
    "Classification",
    "Client",
    "Expert",
    "ModelInfo",
    "Picture",
    "Problem",
    "ServerInfo",
]
