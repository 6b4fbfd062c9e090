"""Export a checkpoint: `sopdeploy.export` and `sopdeploy export`."""

from collections.abc import Callable
from pathlib import Path

from sopdeploy.config import expand_options
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.pipeline import Exported
from sopdeploy_export.pipeline import export as run


@expand_options
def export(
    checkpoint: str | Path,
    out: str | Path = "bundles",
    *,
    options: ExportOptions,
    on_step: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Convert a checkpoint to a bundle: detach, prove equivalence, export, compare.

    For a network outside of the catalog, call `sopdeploy.export_network`.

    Args:
        checkpoint: A checkpoint written by `sopdeploy train`.
        out: Folder for the bundle.
        options: The fields of `ExportOptions`, each as a keyword argument.
        on_step: Called with a description of each step as it begins.

    Returns:
        The path of the bundle and the results of all checks; a notebook shows them with a link to the report.

    Raises:
        ConfigError: Options that are invalid or do not fit together.
        SopdeployError: A step failed; *out* contains nothing new.
    """
    return run(Path(checkpoint), Path(out), options, on_step)
