"""Classify any number of images into parquet files: `sopdeploy.classify` and `sopdeploy classify`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sopdeploy.config import expand_options
from sopdeploy_service.commands.batch.options import ClassifyOptions, RayOptions
from sopdeploy_service.commands.batch.run import Classified
from sopdeploy_service.commands.batch.run import classify as run
from sopdeploy_service.settings import load_settings


@expand_options
def classify(
    bundle: str | Path,
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    options: ClassifyOptions,
    cluster: RayOptions,
    config: str | Path | None = None,
    on_progress: Callable[[int, int, int], None] = lambda _done, _errors, _total: None,
    **settings: Any,
) -> Classified:
    """Classify any number of images into parquet files, one row per image; continue a run that was stopped.

    The memory depends on `workers` and `part_images`, not on the number of images.

    Args:
        bundle: A bundle written by `sopdeploy.export`.
        sources: One or several of: folders, patterns, images, tar archives, lists of paths (`.txt`), parquet
            files, URLs.
        out: Folder for the rows and the report; an interrupted run in it continues.
        options: The fields of `ClassifyOptions`, each as a keyword argument.
        cluster: The fields of `RayOptions`, each as a keyword argument.
        config: TOML file with settings, as for `serve`.
        on_progress: Called with the numbers of images done, with an error, and in total.
        **settings: Settings of the server that apply to decoding and inference, for example `threads=1`,
            `max_batch=8` or `top_k=1`.

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
    loaded = load_settings(None if config is None else Path(config), **settings)
    return run(
        Path(bundle),
        [str(name) for name in names],
        Path(out),
        loaded,
        options,
        on_progress,
        None if cluster.ray is None else cluster,
    )
