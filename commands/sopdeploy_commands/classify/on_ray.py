"""Classify parts on a Ray cluster: Ray Data gives parts to actors, each with a `BatchClassifier`.

Every machine must see the bundle, the output folder and local images under the same paths. Ray
replaces an actor that is lost with its machine, and gives its parts to another one. Every actor
writes the same bytes for a part, and a part gets its final name when it is complete: each image
has one row.
"""

import logging
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray

from sopdeploy import errors
from sopdeploy.base.environment import usable_cores
from sopdeploy.errors import ConfigError, RuntimeUnavailableError, first_line
from sopdeploy_commands.classify.classifier import MAX_WORKERS, BatchClassifier, OnImages
from sopdeploy_commands.classify.options import ClassifyOptions
from sopdeploy_commands.classify.output import OutputFolder, RowsState
from sopdeploy_service.settings import Settings

CONNECT_SECONDS = 5.0
# Finds the lines of a traceback with our errors, such as "sopdeploy.errors.ConfigError: no such
# file".
ERROR_OF_ACTOR = re.compile(r"sopdeploy\.errors\.(\w+): (.+)")


class PartActor:
    """Classifies the parts that Ray Data names, and writes them to the folder *out*.

    Raises `ConfigError` if its rows would not be those of a run with *state*.
    """

    def __init__(
        self,
        bundle: Path,
        settings: Settings,
        options: ClassifyOptions,
        out: Path,
        state: RowsState,
    ) -> None:
        self._folder = OutputFolder(out)

        self._classifier = BatchClassifier(bundle, settings, options)
        if self._classifier.state != state:
            own = self._classifier.state
            raise ConfigError(
                f"{ray.util.get_node_ip_address()} has {own.runtime} with batches of {own.batch}, another "
                f"machine {state.runtime} with batches of {state.batch}; use machines of one kind"
            )

    def __call__(self, task: dict[str, NDArray[np.int64]]) -> dict[str, list[int]]:
        """Classify the parts of *task*, but those that a lost actor has written; return the numbers of images."""
        all_sizes = self._folder.sizes()
        sizes = {part: all_sizes[part] for part in task["part"].tolist()}
        missing = [
            part for part, size in sizes.items() if not self._folder.is_written(part, size)
        ]

        self._classifier.classify_parts(self._folder, missing, lambda _: None)
        return {"images": list(sizes.values())}


class RayClassifier:
    """Classifies parts on the cluster at `options.ray`, as a `BatchClassifier` does in this process.

    Raises `ConfigError` if there is no cluster, and `RuntimeUnavailableError` if Ray does not
    start. `state` and `classify_parts` raise what a `BatchClassifier` raises on a machine.
    """

    def __init__(self, bundle: Path, settings: Settings, options: ClassifyOptions) -> None:
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        ray.data.DataContext.get_current().enable_progress_bars = False
        _connect(options)
        cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        self._actors = options.actors or len(cores)

        # Ray reserves a core of one machine for each worker of an actor. By default, the
        # workers of an actor fit on the smallest machine, and those of all actors on the
        # cluster.
        fitting_workers = min(MAX_WORKERS, *cores, sum(cores) // self._actors)
        workers = options.workers or max(1, fitting_workers)
        self._resources = {"num_cpus": workers, "num_gpus": options.gpus_per_actor}

        self._arguments = (
            bundle.resolve(),
            settings,
            options.model_copy(update={"workers": workers}),
        )

    @cached_property
    def state(self) -> RowsState:
        """The `BatchClassifier.state` of one of the machines."""
        read_state = ray.remote(**self._resources)(
            lambda *arguments: BatchClassifier(*arguments).state
        )
        with errors_of_actors():
            state: RowsState = ray.get(read_state.remote(*self._arguments))
            return state

    def close(self) -> None:
        """Disconnect from the cluster; end one that was started here."""
        ray.shutdown()

    def classify_parts(
        self, folder: OutputFolder, parts: Sequence[int], on_images: OnImages
    ) -> None:
        """Classify *parts* of the list in *folder* and write their rows."""
        classified = ray.data.from_items([{"part": part} for part in parts]).map_batches(
            PartActor,
            batch_size=1,
            fn_constructor_args=(*self._arguments, folder.path.resolve(), self.state),
            compute=ray.data.ActorPoolStrategy(size=self._actors),
            **self._resources,
        )

        with errors_of_actors():
            for row in classified.iter_rows():
                on_images(row["images"])


def _connect(options: ClassifyOptions) -> None:
    """Connect to the Ray cluster of *options* or start one, or raise the error that says why not."""
    address = str(options.ray)
    start_options: dict[str, Any] = {}  # of `ray.init`, for a cluster that starts here

    try:
        if options.starts_cluster:
            # With fewer CPUs than the actors request, Ray would wait for more without an end.
            requested = (options.actors or 1) * (options.workers or 1)
            start_options = {
                "num_cpus": max(usable_cores(), requested),
                "include_dashboard": False,
            }
        elif address != "auto":  # Ray would try for minutes, then end the process
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()

        ray.init(
            address=address, logging_level=logging.ERROR, log_to_driver=False, **start_options
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster at {address}; `local` starts one here", setting="ray"
        ) from error
    except Exception as error:  # Ray gives up after half a minute
        raise RuntimeUnavailableError(
            f"Ray did not start ({first_line(error)}); try again"
        ) from error


@contextmanager
def errors_of_actors() -> Iterator[None]:
    """Raise an error of sopdeploy in an actor as itself, any other as a `RuntimeUnavailableError` of one line."""
    try:
        yield
    except Exception as error:  # Ray's own, or made by it from an actor's
        last_line = str(error).strip().rpartition("\n")[2]

        # Class and message of each error of ours. An error follows its cause, so the last one is
        # that of the actor.
        own_errors = ERROR_OF_ACTOR.findall(str(error))
        class_name, text = (
            own_errors[-1] if own_errors else ("RuntimeUnavailableError", last_line)
        )
        raise getattr(errors, class_name, RuntimeUnavailableError)(
            f"on the Ray cluster: {text}"
        ) from error
