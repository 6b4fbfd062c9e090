"""Clients of the HTTP API."""

from sopdeploy.client.client import AsyncClient as AsyncClient
from sopdeploy.client.client import Classification as Classification
from sopdeploy.client.client import Client as Client
