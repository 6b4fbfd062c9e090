"""One inference request from its body to the body of its answer."""

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from fastapi import Request, Response
from numpy.typing import NDArray

from sopdeploy_service.admission import admit, service_of, taking_apart, unless_refused
from sopdeploy_service.decode import Sent
from sopdeploy_service.leaving import unless_gone
from sopdeploy_service.model import Model
from sopdeploy_service.outcome import Answered, Outcome, Refusal
from sopdeploy_service.problems import RefusedError
from sopdeploy_service.service import Service
from sopdeploy_service.timing import Stages
from sopdeploy_service.upload import in_time, whole
from sopdeploy_service.v2.answers import HEADER_LENGTH, write_answer
from sopdeploy_service.v2.request import InferRequest, read_body
from sopdeploy_service.v2.signature import Signature


async def answer_infer(request: Request, name: str, version: str | None) -> Response:
    """Return the outputs that *request* asks of the model; raises `RefusedError` where there are none."""
    service = service_of(request)
    started = time.monotonic()
    model, deadline = admit(request, name, version)
    signature = Signature.of(model.bundle, service.settings.max_images)
    stages = Stages()
    with model.in_use():  # from its admission on: while a slow body comes, the model may be replaced twice
        asked = await receive(request, service, model, signature, deadline)
        received = time.monotonic()
        service.metrics.stage("receive", received - started)
        stages.note("receive", received - started, received)
        if asked.timeout_seconds is not None:
            deadline = min(deadline, started + asked.timeout_seconds)
        work = run(service, model, asked, deadline, stages)
        outcomes = unless_refused(await unless_gone(work, request.scope, request.receive))
    head = {"model_name": model.name, "model_version": model.version}
    if asked.id is not None:
        head = {"id": asked.id, **head}
    labels = {signature.outputs[0].name: model.labels}
    body, headers = write_answer(head, stacked(outcomes), asked.outputs, labels)
    return Response(body, headers={**headers, "Server-Timing": stages.header()})


async def receive(
    request: Request, service: Service, model: Model, signature: Signature, deadline: float
) -> InferRequest:
    """Return the request in the body; it is read in a thread, a large JSON would hold up the event loop."""
    settings = service.settings
    body = await in_time(request, whole(request, settings.max_body_bytes), deadline)
    header = request.headers.get(HEADER_LENGTH)
    async with taking_apart(service, model, deadline):
        return await service.parse(read_body, body, header, signature, settings.max_json_bytes)


async def run(
    service: Service, model: Model, asked: InferRequest, deadline: float, stages: Stages
) -> list[Outcome] | Refusal:
    """Return the outcome of each image of *asked*, decoding those that are files."""
    if isinstance(asked.images, list):
        return await service.classify(model, [Sent(image) for image in asked.images], deadline, stages)
    return await service.infer(model, asked.images, deadline, stages)


def stacked(outcomes: Sequence[Outcome]) -> dict[str, NDArray[np.float32]]:
    """Return the outputs (n, ...) of all images by name.

    The protocol has one status for a request, so the first refused image, named by its index, refuses it.
    """
    answered: list[Answered] = []
    for place, outcome in enumerate(outcomes):
        if isinstance(outcome, Refusal):
            raise RefusedError(replace(outcome, message=f"image {place}: {outcome.message}"))
        answered.append(outcome)
    return {name: np.stack([one.outputs[name] for one in answered]) for name in answered[0].outputs}
