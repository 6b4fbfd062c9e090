"""Replicas on a Ray of their own, for `benchmarks/scale_out.py`: each over a pretend engine of known time.

python benchmarks/scale_out_ray.py --port 8000 --replicas 2 --pretend 20,10 --largest 8
"""

import argparse
import os
import signal
import sys
import threading
from typing import Any

import ray
from ray import serve
from serving_ours import pretend, settings_for

from sopdeploy_service.server.on_ray.application import OnRay, application
from sopdeploy_service.server.on_ray.plan import NAME, Scale, changed_settings, deployment, http_options


def replica_of(fixed_ms: float, per_image_ms: float, largest: int) -> type[OnRay]:
    """Return a replica that answers with a network which only sleeps."""

    class Pretending(OnRay):
        def __init__(self, settings: dict[str, Any]) -> None:
            super().__init__(settings, {"model": pretend(fixed_ms, per_image_ms, largest)})

    return Pretending


def main() -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--replicas", type=int, required=True)
    parser.add_argument("--pretend", required=True, help="milliseconds of a batch and of each image in it")
    parser.add_argument("--largest", type=int, default=8)
    parser.add_argument("--decoders", type=int, default=2)
    given = parser.parse_args()
    told = threading.Event()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    ray.init(address="local", num_cpus=given.replicas, include_dashboard=False, log_to_driver=False)
    try:
        settings = settings_for(given.largest, decoders=given.decoders, threads=1)
        settings = settings.model_copy(update={"port": given.port})
        options = deployment({}, settings, Scale(fewest=given.replicas, most=given.replicas))
        del options["user_config"]  # the network is there from the start
        fixed, each = map(float, given.pretend.split(","))
        serve.start(http_options=http_options(settings))
        serve.run(
            application(replica_of(fixed, each, given.largest), changed_settings(settings), **options),
            name=NAME,
        )
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, lambda *_: told.set())
        while not told.wait(1.0):
            pass
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
