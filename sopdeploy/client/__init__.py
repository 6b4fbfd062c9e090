"""Client of `sopdeploy serve`, which imports neither torch nor the server."""

from sopdeploy.client.client import Client
from sopdeploy.client.messages import Classification, Embedding, ImageLike
from sopdeploy.http_api import ClassProbability, ModelInfo, Problem, ServerInfo

__all__ = [
    "ClassProbability",
    "Classification",
    "Client",
    "Embedding",
    "ImageLike",
    "ModelInfo",
    "Problem",
    "ServerInfo",
]
