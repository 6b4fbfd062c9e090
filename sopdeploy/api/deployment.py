"""Export a checkpoint: `sopdeploy.export` and `sopdeploy export`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import pydantic

from sopdeploy.api.user_network import NetworkSource, export_weights
from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.config import first_problem
from sopdeploy.errors import ConfigError
from sopdeploy_export.pipeline import Exported, ExportOptions
from sopdeploy_export.pipeline import export as run
from sopdeploy_export.precision.report import PrecisionOptions

LARGEST_BATCH = 1_000_000


def export(
    checkpoint: str | Path,
    out: str | Path = "bundles",
    *,
    detach: bool = False,
    max_batch: int = 64,
    probes: str | Path | None = None,
    allow_drift: bool = False,
    precision: Literal["fp32", "fp16", "bf16-backbone", "int8"] = "fp32",
    newton_schulz: Literal["fp32", "fp16"] = "fp32",
    calibrate: str | Path | None = None,
    calibration: Literal["minmax", "entropy", "percentile"] | None = None,
    int8_for: Literal["cpu", "tensorrt"] | None = None,
    keep_float: Sequence[str] = (),
    evaluate: str | Path | None = None,
    max_drop: float = 1.0,
    lowering: bool = True,
    autotune: bool = False,
    measure_speed: bool = False,
    pt2: bool = False,
    with_cam: bool = False,
    user_network: NetworkSource | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Convert a checkpoint to a bundle: detach, prove equivalence, export, compare.

    The parameters and defaults are those of `sopdeploy export`.

    Args:
        checkpoint: A checkpoint written by `sopdeploy train`.
        out: Folder for the bundle.
        detach: Remove training-only branches and prove equivalence.
        max_batch: Largest batch that the bundle must accept.
        probes: Folder of images to compare on, in addition to generated ones.
        allow_drift: Write the bundle despite numeric drift, and record it.
        precision: Precision of the graph.
        newton_schulz: Type of the Newton-Schulz iteration; fp16 needs *precision* fp16.
        calibrate: Folder of images to calibrate int8 ranges.
        calibration: Calibration method for int8 ranges; by default the first that loses little enough.
        int8_for: Runtime to quantize for, with int8; the default is cpu.
        keep_float: Network parts whose convolutions stay in float32, with int8.
        evaluate: Folder of images by class, to measure top-1 before and after the change of precision.
        max_drop: Largest allowed loss of top-1 (or agreement) in percentage points.
        lowering: Apply the rewrite rules; otherwise export the certified graph as it is.
        autotune: Choose between equivalent forms by timing, not by heuristic.
        measure_speed: Time the graph against the plain backbone.
        pt2: Also store the certified torch.export program in the bundle.
        with_cam: Add class activation maps; the network must end in average pooling and a linear layer.
        user_network: A network outside of the catalog, if *checkpoint* is the file of its weights. For a
            network in memory, call `sopdeploy.export_network`.
        on_step: Called with a description of each step as it begins.

    Returns:
        The path of the bundle and the results of all checks; a notebook shows them with a link to the report.

    Raises:
        ConfigError: Options that are invalid or do not fit together.
        SopdeployError: A step failed; *out* contains nothing new.
    """
    int8 = precision == "int8"
    problems = {
        "--newton-schulz fp16: only with --precision fp16": newton_schulz == "fp16" and precision != "fp16",
        "--int8-for: only with --precision int8": int8_for and not int8,
        "--keep-float: only with --precision int8": keep_float and not int8,
        "--calibrate: only with --precision int8": calibrate and not int8,
        "--autotune: --no-lowering has no forms to choose from; remove one": autotune and not lowering,
        "--detach: with --network, name the parts to remove with --training-only": detach and user_network,
        f"--max-batch {max_batch}: give at least 1": max_batch < 1,
        f"--max-batch {max_batch}: give at most {LARGEST_BATCH}": max_batch > LARGEST_BATCH,
    }
    for message, found in problems.items():
        if found:
            raise ConfigError(message)

    def path_or_none(path: str | Path | None) -> Path | None:
        return None if path is None else Path(path)

    try:
        precision_options = PrecisionOptions(
            precision=precision,
            newton_schulz=newton_schulz,
            calibrate=path_or_none(calibrate),
            calibration=calibration,
            int8_for=int8_for or "cpu",
            keep_float=tuple(keep_float),
            evaluate=path_or_none(evaluate),
            max_drop=max_drop,
        )
        options = ExportOptions(
            detach=detach,
            batch=BatchRange(optimum=min(8, max_batch), maximum=max_batch),
            probes=path_or_none(probes),
            allow_drift=allow_drift,
            lowering=lowering,
            autotune=autotune,
            precision=precision_options,
            measure_speed=measure_speed,
            pt2=pt2,
            with_cam=with_cam,
        )
    except pydantic.ValidationError as error:
        raise ConfigError(first_problem(error)) from error
    if user_network is not None:
        return export_weights(user_network, Path(out), options, on_step)
    return run(Path(checkpoint), Path(out), options, on_step)
