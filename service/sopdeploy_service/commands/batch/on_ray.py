"""Classify parts on a Ray cluster: Ray Data gives parts to actors, each with a `PartClassifier`.

Every machine must see the bundle, the output folder and local images under the same paths. Ray replaces an
actor that is lost with its machine, and gives its parts to another one. A part has the same bytes whoever
writes it, and has its final name only when it is complete, so every image has its row exactly once.
"""

import logging
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray

from sopdeploy import errors
from sopdeploy.environment import usable_cores
from sopdeploy.errors import ConfigError, RuntimeUnavailableError, first_line
from sopdeploy_service.commands.batch.classifier import MAX_WORKERS, PartClassifier
from sopdeploy_service.commands.batch.listing import Listing
from sopdeploy_service.commands.batch.options import NEW_CLUSTER, ClassifyOptions
from sopdeploy_service.commands.batch.output import LISTING, OutputFolder, RunState
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import Settings

PARTS_PER_TASK = 8  # at most: within a task, the decoders of an actor work ahead
TASKS_PER_ACTOR = 8  # at least, if there are so many parts: actors differ in speed
_CONNECT_SECONDS = 5.0
ERROR_OF_ACTOR = re.compile(r"sopdeploy\.errors\.(\w+): (.+)")  # in the traceback that Ray raises


@dataclass(frozen=True)
class Job:
    """What an actor loads; the paths are valid on all machines."""

    bundle: Path
    settings: Settings
    options: ClassifyOptions

    def load(self) -> PartClassifier:
        """Load the bundle on this machine."""
        return PartClassifier(load_model(self.bundle, self.settings), self.settings, self.options)

    def run_state(self) -> RunState:
        """Return what the rows of this machine depend on; the source is added later."""
        return self.load().run_state("", 1)  # without its decoder processes


class PartActor:
    """Classifies the parts that Ray Data names, and writes them to the folder *out*.

    Raises `ConfigError` if its rows would not be those of a run with *state*.
    """

    def __init__(self, job: Job, out: Path, state: RunState) -> None:
        self._folder, self._listing, self._classifier = OutputFolder(out), Listing(out / LISTING), job.load()
        found = self._classifier.run_state("", 1)
        if found != state:
            here, other = (f"{of.runtime} with batches of {of.batch}" for of in (found, state))
            address = ray.util.get_node_ip_address()
            raise ConfigError(f"{address} has {here}, another machine {other}; use machines of one kind")
        self._classifier.__enter__()  # until this process ends

    def __call__(self, batch: dict[str, NDArray[np.int64]]) -> dict[str, list[int]]:
        """Classify the parts of *batch*; return the numbers of images and of errors of each."""
        parts = [(part, self._listing.images_of(part)) for part in batch["part"].tolist()]
        # An actor that was lost may have written some of them.
        missing = [part for part, size in parts if self._folder.errors_in(part, size) is None]
        self._classifier.write_parts(self._folder, self._listing, missing, lambda _images, _errors: None)
        failed = [self._folder.errors_in(part, size) or 0 for part, size in parts]
        return {"images": [size for _, size in parts], "errors": failed}


@contextmanager
def errors_of_actors() -> Iterator[None]:
    """Raise the error of an actor, or in one line what Ray says, which has several tracebacks."""
    try:
        yield
    except Exception as error:  # Ray's own, or made by it from an actor's
        found = ERROR_OF_ACTOR.findall(str(error))
        kind, text = found[-1] if found else ("", str(error).strip().rpartition("\n")[2])
        raise getattr(errors, kind, RuntimeUnavailableError)(f"on the Ray cluster: {text}") from error


def connect_ray(address: str, **options: int) -> None:
    """Connect to the Ray cluster at *address*, or start one with *options* here; raises `ConfigError`."""
    try:
        if address not in {"auto", NEW_CLUSTER}:  # Ray would try for minutes, then end the process
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no Ray cluster at {address}; `local` starts one here", setting="ray") from error
    except Exception as error:  # Ray gives up after half a minute
        raise RuntimeUnavailableError(f"Ray did not start ({first_line(error)}); try again") from error


class RayClassifier:
    """Classifies parts on the cluster at `options.ray`; a context manager that is connected to it.

    Raises `ConfigError` if there is no cluster, and what a `PartClassifier` raises on one of its machines.
    """

    def __init__(self, bundle: Path, settings: Settings, options: ClassifyOptions) -> None:
        self._bundle, self._settings, self._options = bundle.resolve(), settings, options

    def __enter__(self) -> "RayClassifier":
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        ray.data.DataContext.get_current().enable_progress_bars = False
        actors, workers = self._options.actors, self._options.workers
        if self._options.ray == NEW_CLUSTER:
            actors = actors or 1
            workers = workers or min(MAX_WORKERS, max(1, usable_cores() // actors))
            connect_ray(NEW_CLUSTER, num_cpus=actors * workers, include_dashboard=False)
        else:
            connect_ray(str(self._options.ray))
            cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
            workers = workers or min([MAX_WORKERS, *filter(None, cores)])
            actors = actors or max(1, sum(number >= workers for number in cores))
        self._actors = actors
        self._resources = {"num_cpus": workers, "num_gpus": self._options.gpus_per_actor}
        options = self._options.model_copy(update={"workers": workers})
        self._job = Job(self._bundle, self._settings, options)
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()

    @cached_property
    def _state(self) -> RunState:
        """What the rows of one of the machines depend on."""
        if self._options.ray == NEW_CLUSTER and "GPU" not in ray.cluster_resources():
            return self._job.run_state()  # saves a process; Ray hides GPUs from tasks that request none
        with errors_of_actors():
            state: RunState = ray.get(ray.remote(**self._resources)(Job.run_state).remote(self._job))
            return state

    @property
    def part_images(self) -> int:
        """The number of images in a part: full batches of the runtime of the machines."""
        return self._state.part_images

    def run_state(self, source: str, num_images: int) -> RunState:
        """Return what the rows of a run depend on, as `PartClassifier.run_state`."""
        return self._state.model_copy(update={"source": source, "num_images": num_images})

    def write_parts(
        self,
        folder: OutputFolder,
        listing: Listing,  # noqa: ARG002 - an actor reads it from the folder
        parts: Sequence[int],
        on_block: Callable[[int, int], None],
    ) -> None:
        """Classify *parts* of the list in *folder*, as `PartClassifier.write_parts`."""
        if not parts:
            return
        tasks = max(-(-len(parts) // PARTS_PER_TASK), min(len(parts), TASKS_PER_ACTOR * self._actors))
        numbers = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=tasks)
        classified = numbers.map_batches(
            PartActor,
            batch_size=None,  # all parts of a task
            fn_constructor_args=(self._job, folder.path.resolve(), self._state),
            compute=ray.data.ActorPoolStrategy(size=self._actors),
            **self._resources,
        )
        with errors_of_actors():
            for row in classified.iter_rows():
                on_block(row["images"], row["errors"])
