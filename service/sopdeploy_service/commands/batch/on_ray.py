"""`sopdeploy classify --ray`: classify parts on a Ray cluster with Ray Data.

Each actor holds the runtime and its decoder processes. It gets the list of one part and returns the rows of
that part, which this process writes. Therefore only the bundle and the images must be readable on all
machines, and the output equals that of a run on one machine. A failure never leaves an incomplete part: Ray
repeats the part of an actor or a machine that dies, and a stopped run continues with the parts that are not
written yet.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sopdeploy.environment import import_optional
from sopdeploy.errors import ConfigError, SopdeployError
from sopdeploy_service.commands.batch.classifier import PartClassifier
from sopdeploy_service.commands.batch.options import ClassifyOptions, RayOptions
from sopdeploy_service.commands.batch.output import RunState
from sopdeploy_service.commands.batch.reader import import_pyarrow
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import Settings, load_settings

AUTO = "auto"  # the cluster of this machine or of RAY_ADDRESS; without one, Ray starts here
USAGE_VARIABLE = "RAY_USAGE_STATS_ENABLED"
PATHS = ("require_signature", "engine_cache")  # settings that are paths


class RayClassifier:
    """Runs in an actor: classifies one part per call."""

    def __init__(self, bundle: str, given: dict[str, Any], options: dict[str, Any]) -> None:
        self._classifier = load_classifier(bundle, given, options).__enter__()  # ends with this process

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Classify the `entries` of the `part` in *row*; return its number and its `rows`, serialized."""
        ((number, table),) = self._classifier.tables([(int(row["part"]), unpack(row["entries"]))])
        return {"part": number, "rows": pack(table)}


def load_classifier(bundle: str, given: dict[str, Any], options: dict[str, Any]) -> PartClassifier:
    """Load *bundle* with the settings *given*."""
    settings = load_settings(**given)
    return PartClassifier(load_model(Path(bundle), settings), settings, ClassifyOptions(**options))


def describe(bundle: str, given: dict[str, Any], options: dict[str, Any]) -> RunState:
    """Load *bundle* in a process of the cluster and return the state of a run."""
    return load_classifier(bundle, given, options).state


@contextmanager
def ray_classifier(
    bundle: Path, settings: Settings, options: ClassifyOptions, chosen: RayOptions
) -> Iterator["ClusterClassifier"]:
    """Join the Ray cluster that *chosen* names and yield a classifier on it; leave the cluster at the end.

    Raises `ConfigError` if Ray is not installed or the cluster cannot be reached.
    """
    ray = import_optional("ray", "Ray", "sopdeploy[batch,ray]", ConfigError, "classification on a cluster")
    os.environ.setdefault(USAGE_VARIABLE, "0")  # no usage statistics
    address = {} if chosen.ray == AUTO else {"address": chosen.ray}
    joined = not ray.is_initialized()
    if joined:
        try:
            ray.init(**address, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"{chosen.ray}: no Ray cluster can be joined ({reason}); check the address"
            ) from error
    try:
        if chosen.ray == AUTO and len(ray.nodes()) == 1:  # a larger cluster may add machines
            check_resources(ray.cluster_resources(), chosen)
        with _errors_without_ray():
            yield ClusterClassifier(bundle, settings, options, chosen)
    finally:
        if joined:
            ray.shutdown()


def check_resources(available: Mapping[str, float], chosen: RayOptions) -> None:
    """Raise `ConfigError` if no actor fits on this machine; Ray would wait for another one forever."""
    for kind, setting in (("CPU", "cpus_per_actor"), ("GPU", "gpus_per_actor")):
        wanted, present = getattr(chosen, setting), available.get(kind, 0.0)
        if wanted > present:
            raise ConfigError(
                f"Ray has {present:g} {kind}s here; give less, or the address of a larger cluster",
                setting=setting,
                value=wanted,
            )


class ClusterClassifier:
    """Classifies parts on the Ray cluster that this process has joined, like `PartClassifier`."""

    def __init__(
        self, bundle: Path, settings: Settings, options: ClassifyOptions, chosen: RayOptions
    ) -> None:
        given = settings.model_dump(mode="json", exclude_unset=True)
        for name in PATHS:
            if given.get(name):
                given[name] = str(Path(given[name]).resolve())
        given["threads"] = settings.threads or chosen.cpus_per_actor
        workers = options.workers or chosen.cpus_per_actor
        self._arguments = (str(bundle.resolve()), given, {**options.model_dump(), "workers": workers})
        self._actors = chosen.actors
        self._resources = {"num_cpus": chosen.cpus_per_actor, "num_gpus": chosen.gpus_per_actor}
        ray = import_optional("ray", "Ray", "sopdeploy[batch,ray]", ConfigError)
        # The runtime of the cluster may differ from that of this machine.
        task = ray.remote(**self._resources)(describe)
        self.state: RunState = ray.get(task.remote(*self._arguments))

    def tables(
        self, parts: Iterable[tuple[int, Any]], on_block: Callable[[int, int], None]
    ) -> Iterator[tuple[int, Any]]:
        """Classify *parts*, tables of the list by number, in actors; yield the rows of each on arrival."""
        data = import_optional("ray.data", "Ray Data", "sopdeploy[batch,ray]", ConfigError)
        data.DataContext.get_current().enable_progress_bars = False
        rows = [{"part": number, "entries": pack(table)} for number, table in parts]
        classified = data.from_items(rows, override_num_blocks=len(rows)).map(
            RayClassifier,
            fn_constructor_args=self._arguments,
            compute=data.ActorPoolStrategy(size=self._actors, max_tasks_in_flight_per_actor=1),
            **self._resources,
        )
        for row in classified.iter_rows():
            table = unpack(row["rows"])
            on_block(len(table), int(table.schema.metadata[b"errors"]))
            yield int(row["part"]), table


@contextmanager
def _errors_without_ray() -> Iterator[None]:
    """Raise the `SopdeployError` that an error of Ray has as its cause, without Ray's traceback."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, SopdeployError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is None or cause is error:
            raise
        raise cause from None


def pack(table: Any) -> bytes:
    """Serialize an Arrow *table*."""
    arrow = import_pyarrow("pyarrow")
    sink = arrow.BufferOutputStream()
    with arrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def unpack(content: bytes) -> Any:
    """Read what `pack` wrote."""
    return import_pyarrow("pyarrow").ipc.open_stream(content).read_all()
