"""Classify any number of images into parquet files: `sopdeploy.classify` and `sopdeploy classify`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pydantic

from sopdeploy.config import first_problem
from sopdeploy.errors import ConfigError
from sopdeploy_service.commands.batch.classifier import PART_IMAGES, ClassifyOptions
from sopdeploy_service.commands.batch.on_ray import RayOptions
from sopdeploy_service.commands.batch.run import Classified
from sopdeploy_service.commands.batch.run import classify as run
from sopdeploy_service.settings import load_settings


def classify(
    bundle: str | Path,
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    batch: int | None = None,
    top_k: int | None = None,
    logits: bool = False,
    features: bool = False,
    max_errors: int | None = None,
    workers: int | None = None,
    part_images: int = PART_IMAGES,
    runtime: str | None = None,
    config: str | Path | None = None,
    ray: str | None = None,
    actors: int = 1,
    cpus_per_actor: int = 1,
    gpus_per_actor: float = 0.0,
    on_progress: Callable[[int, int, int], None] = lambda _done, _errors, _total: None,
    **settings: Any,
) -> Classified:
    """Classify any number of images into parquet files, one row per image; continue a run that was stopped.

    The parameters and defaults are those of `sopdeploy classify`. The memory depends on `workers` and
    `part_images`, not on the number of images.

    Args:
        bundle: A bundle written by `sopdeploy.export`.
        sources: One or several of: folders, patterns, images, tar archives, lists of paths (`.txt`), parquet
            files, URLs.
        out: Folder for the rows and the report; an interrupted run in it continues.
        batch: Images per batch; the default is 4 on a CPU, otherwise the largest that the bundle accepts.
        top_k: Classes per image.
        logits: Add a column with the logits.
        features: Add a column with the mean features; the bundle must have been exported with `with_cam`.
        max_errors: Stop when more images than this have an error.
        workers: Decoder processes; the default is one per core, up to 16.
        part_images: Images of one parquet file.
        runtime: Runtime, as for `serve`.
        config: TOML file with settings, as for `serve`.
        ray: Address of a Ray cluster that classifies the images; `auto` joins or starts one here.
        actors: With *ray*, the processes that hold the network.
        cpus_per_actor: With *ray*, the cores of an actor.
        gpus_per_actor: With *ray*, the share of a GPU of an actor.
        on_progress: Called with the numbers of images done, with an error, and in total.
        **settings: Settings of the server that apply to decoding and inference, for example `threads=1`.

    Returns:
        The folder, the numbers of images, errors and images per class, and whether the predictions drift; a
        notebook shows them with a link to the report.

    Raises:
        DataError: A source is missing, damaged or has no images, or too many images have an error.
        ConfigError: Invalid options, or *out* belongs to another run.
        BundleError: The bundle is damaged.
        StorageError: *out* cannot be written.
        RuntimeUnavailableError: No runtime can run the bundle, or its device failed.
    """
    names = [sources] if isinstance(sources, str | Path) else list(sources)
    chosen = {"top_k": top_k, "runtime": runtime, **settings}
    if batch is not None:
        chosen["max_batch"] = batch
    try:
        options = ClassifyOptions(
            logits=logits, features=features, max_errors=max_errors, workers=workers, part_images=part_images
        )
        cluster = None
        if ray is not None:
            cluster = RayOptions(address=ray, actors=actors, cpus=cpus_per_actor, gpus=gpus_per_actor)
    except pydantic.ValidationError as problem:
        raise ConfigError(f"classify: {first_problem(problem)}") from problem
    loaded = load_settings(None if config is None else Path(config), **chosen)
    return run(Path(bundle), [str(name) for name in names], Path(out), loaded, options, on_progress, cluster)
