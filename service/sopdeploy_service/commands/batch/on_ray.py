"""`sopdeploy classify --ray`: classify parts on a Ray cluster with Ray Data.

Each actor holds the runtime and its decoder processes. It gets the list of one part and returns the rows of
that part, which this process writes. Therefore only the bundle and the images must be readable on all
machines, and the output equals that of a run on one machine. A failure never leaves an incomplete part: Ray
repeats the part of an actor or a machine that dies, and a stopped run continues with the parts that are not
written yet.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sopdeploy.environment import import_optional
from sopdeploy.errors import ConfigError, SopdeployError
from sopdeploy_service.commands.batch.classifier import PartClassifier
from sopdeploy_service.commands.batch.listing import Listing, entries_of
from sopdeploy_service.commands.batch.options import ClassifyOptions, RayOptions
from sopdeploy_service.commands.batch.output import OutputFolder, Progress, RunState
from sopdeploy_service.commands.batch.reader import import_pyarrow
from sopdeploy_service.commands.batch.rows import RowFormat
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import Settings, load_settings

AUTO = "auto"  # the cluster of this machine or of RAY_ADDRESS; without one, Ray starts here
USAGE_VARIABLE = "RAY_USAGE_STATS_ENABLED"
PATHS = ("verify_key", "fast_decode_samples", "engine_cache")  # settings that are paths


class RayClassifier:
    """Runs in an actor: classifies one part per call."""

    def __init__(self, bundle: str, given: dict[str, Any], options: dict[str, Any]) -> None:
        self._classifier = load_classifier(bundle, given, options)
        self._decoders = self._classifier.decoders().__enter__()  # end with this process
        self._format = RowFormat(
            self._classifier.loaded.bundle, self._classifier.top_k, ClassifyOptions(**options)
        )

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Classify the `entries` of the `part` in *row*; return its number and its `rows`, serialized."""
        part = (int(row["part"]), entries_of(unpack(row["entries"])))
        (outputs,) = self._classifier.run(iter([part]), self._decoders)
        return {"part": outputs.number, "rows": pack(self._format.table(outputs))}


@contextmanager
def ray_backend(
    bundle: Path, settings: Settings, options: ClassifyOptions, chosen: RayOptions
) -> Iterator["RayBackend"]:
    """Join the Ray cluster that *chosen* names and yield a backend on it; leave the cluster at the end.

    Raises `ConfigError` if Ray is not installed or the cluster cannot be reached.
    """
    ray = import_optional("ray", "Ray", "sopdeploy[batch,ray]", ConfigError, "classification on a cluster")
    os.environ.setdefault(USAGE_VARIABLE, "0")  # no usage statistics
    address = {} if chosen.ray in (None, AUTO) else {"address": chosen.ray}
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
        if chosen.ray in (None, AUTO) and len(ray.nodes()) == 1:  # a larger cluster may add machines
            check_resources(ray.cluster_resources(), chosen)
        yield RayBackend(bundle, settings, options, chosen)
    finally:
        if joined:
            ray.shutdown()


def check_resources(available: Mapping[str, float], chosen: RayOptions) -> None:
    """Raise `ConfigError` if no actor fits on this machine; Ray would wait for another one forever."""
    for kind, wanted in (("CPU", chosen.cpus_per_actor), ("GPU", chosen.gpus_per_actor)):
        if wanted > available.get(kind, 0.0):
            raise ConfigError(
                f"--{kind.lower()}s-per-actor {wanted:g}: Ray has {available.get(kind, 0.0):g} {kind}s here; "
                "give a smaller number, or the address of a larger cluster"
            )


class RayBackend:
    """Classifies parts on the Ray cluster that this process has joined."""

    def __init__(
        self, bundle: Path, settings: Settings, options: ClassifyOptions, chosen: RayOptions
    ) -> None:
        given = settings.model_dump(mode="json", exclude_unset=True)
        for name in PATHS:
            if given.get(name):
                given[name] = str(Path(given[name]).resolve())
        given["threads"] = settings.threads or chosen.cpus_per_actor
        workers = options.workers or max(1, chosen.cpus_per_actor)
        self._arguments = (
            str(bundle.resolve()),
            given,
            options.model_copy(update={"workers": workers}).model_dump(),
        )
        self._chosen = chosen

    def state(self) -> RunState:
        """Return the run state of a process of the cluster, whose runtime may differ from the local one."""
        ray = import_optional("ray", "Ray", "sopdeploy[batch,ray]", ConfigError)
        task = ray.remote(num_cpus=self._chosen.cpus_per_actor, num_gpus=self._chosen.gpus_per_actor)(
            describe
        )
        with _errors_without_ray():
            state: RunState = ray.get(task.remote(*self._arguments))
        return state

    def write_parts(
        self, folder: OutputFolder, listing: Listing, pending: Sequence[int], progress: Progress
    ) -> None:
        """Classify the *pending* parts in actors on all machines; write each part when it arrives."""
        data = import_optional("ray.data", "Ray Data", "sopdeploy[batch,ray]", ConfigError)
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        rows = [{"part": number, "entries": pack(listing.read_table(number))} for number in pending]
        with _errors_without_ray():
            classified = data.from_items(rows, override_num_blocks=len(rows)).map(
                RayClassifier,
                fn_constructor_args=self._arguments,
                compute=data.ActorPoolStrategy(size=self._chosen.actors, max_tasks_in_flight_per_actor=1),
                num_cpus=self._chosen.cpus_per_actor,
                num_gpus=self._chosen.gpus_per_actor,
            )
            for row in classified.iter_rows():
                table = unpack(row["rows"])
                folder.write_part(int(row["part"]), table)
                progress.add(len(table), int(table.schema.metadata[b"errors"]))


def describe(bundle: str, given: dict[str, Any], options: dict[str, Any]) -> RunState:
    """Load *bundle* in a process of the cluster and return the state of a run."""
    return load_classifier(bundle, given, options).state()


def load_classifier(bundle: str, given: dict[str, Any], options: dict[str, Any]) -> PartClassifier:
    """Load *bundle* with the settings *given*."""
    settings = load_settings(**given)
    return PartClassifier(load_model(Path(bundle), settings), settings, ClassifyOptions(**options))


@contextmanager
def _errors_without_ray() -> Iterator[None]:
    """Raise the `SopdeployError` that an error of Ray has as its cause, without Ray's traceback."""
    try:
        yield
    except SopdeployError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, SopdeployError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is None:
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
