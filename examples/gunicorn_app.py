"""A web application of your own that asks a running server; gunicorn starts it.

pip install gunicorn
SOPDEPLOY_URL=http://127.0.0.1:8000 gunicorn --workers 4 gunicorn_app:app
curl --data-binary @photo.jpg http://127.0.0.1:8001/
"""

import functools
import json
import os

from sopdeploy.client import Client
from sopdeploy.errors import OverloadedError, SopdeployError, UnreachableError

MAX_BYTES = 20_000_000


@functools.cache
def client():
    """Open the connections of this worker with its first request: after gunicorn has forked it."""
    return Client(os.environ.get("SOPDEPLOY_URL", "http://127.0.0.1:8000"), timeout=10)


def app(environ, start_response):
    """Answer with the class of the photograph in the body, or with the error of the server."""
    length = int(environ.get("CONTENT_LENGTH") or 0)
    try:
        answer = client().classify(environ["wsgi.input"].read(min(length, MAX_BYTES)))
        status, body = "200 OK", {"class": answer.classes[0].label, "known": answer.known}
    except (OverloadedError, UnreachableError) as error:  # the photograph may be right
        status, body = "503 Service Unavailable", {"error": str(error)}
    except SopdeployError as error:
        status, body = "400 Bad Request", {"error": str(error)}
    start_response(status, [("Content-Type", "application/json")])
    return [json.dumps(body).encode()]
