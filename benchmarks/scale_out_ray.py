"""Replicas on a local Ray cluster for `benchmarks/scale_out.py`, each with a simulated runtime.

python benchmarks/scale_out_ray.py --port 8000 --replicas 2 --fake 20,10 --largest 8
"""

import argparse
import os
import signal
import sys
import threading
from typing import Any

import ray
from ray import serve
from serving_ours import fake_model, settings_for

from sopdeploy_service.server.on_ray.application import OnRay, application
from sopdeploy_service.server.on_ray.plan import NAME, changed_settings, deployment, http_options
from sopdeploy_service.server.on_ray.scale import ScaleOptions


def replica_of(fixed_ms: float, per_image_ms: float, largest: int) -> type[OnRay]:
    """Create a replica class with a model whose runtime sleeps."""

    class FakeReplica(OnRay):
        def __init__(self, settings: dict[str, Any]) -> None:
            super().__init__(settings, {"model": fake_model(fixed_ms, per_image_ms, largest)})

    return FakeReplica


def main() -> None:
    """Serve until a signal arrives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--replicas", type=int, required=True)
    parser.add_argument("--fake", required=True, help="milliseconds per batch and per image")
    parser.add_argument("--largest", type=int, default=8)
    parser.add_argument("--decoders", type=int, default=2)
    arguments = parser.parse_args()
    stopped = threading.Event()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    ray.init(address="local", num_cpus=arguments.replicas, include_dashboard=False, log_to_driver=False)
    try:
        settings = settings_for(arguments.largest, decoders=arguments.decoders, threads=1)
        settings = settings.model_copy(update={"port": arguments.port})
        options = deployment({}, settings, ScaleOptions(replicas=arguments.replicas))
        del options["user_config"]  # the model is passed to the replica
        fixed, each = map(float, arguments.fake.split(","))
        serve.start(http_options=http_options(settings))
        serve.run(
            application(replica_of(fixed, each, arguments.largest), changed_settings(settings), **options),
            name=NAME,
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopped.set())
        while not stopped.wait(1.0):
            pass
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
