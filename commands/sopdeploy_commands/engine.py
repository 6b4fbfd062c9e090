"""`sopdeploy engine`: build the TensorRT engine of a bundle for this GPU."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sopdeploy.base.environment import import_optional
from sopdeploy.cli.command import command, expand_options
from sopdeploy.cli.console import print_field
from sopdeploy.errors import ConfigError, EngineError, RuntimeUnavailableError
from sopdeploy.weights.files import check_is_checkpoint
from sopdeploy_export.options import EngineOptions

if TYPE_CHECKING:
    from sopdeploy_commands.engine_builder.engine import EngineFile


def _show_engine(engine: "EngineFile") -> None:
    record = engine.record
    key = engine.record.key
    print_field("engine", f"{key.gpu} ({key.architecture}), TensorRT {key.tensorrt}")
    print_field("built", engine.reason or "no, it was in the cache")
    print_field("profiles", f"batches {', '.join(map(str, key.profiles))}")
    print_field("precision", key.precision)

    for replay in record.replays:
        for text in replay.lines():
            print_field("outputs", text)
    if record.accepted_errors:
        changed = max(replay.num_changed for replay in record.replays)
        print_field(
            "accepted",
            f"a numerical error beyond the tolerance, which changes the class of {changed} reference images",
            style="bold yellow",
        )
    print_field("ready", f"{engine.path} ({record.plan_bytes:,} bytes)", style="bold green")


@command(
    _show_engine,
    summarize=lambda engine: {
        "plan": str(engine.path),
        "built": engine.reason is not None,
        "reason": engine.reason,
        "record": engine.record.model_dump(mode="json"),
    },
    examples=("sopdeploy engine bundles/photos-3f6c01d2a4b7 --profiles 1,8,32",),
)
@expand_options
def engine(
    bundle: Path, *, options: EngineOptions, on_step: Callable[[str], None] = lambda _: None
) -> "EngineFile":
    """Build the TensorRT engine of a bundle for this GPU, or find it in the cache, and check its outputs.

    Args:
        bundle: A bundle written by `sopdeploy export`.
    """
    import_optional("onnx", "onnx", ".[tensorrt]", RuntimeUnavailableError)
    from sopdeploy.bundle.folder import open_bundle
    from sopdeploy_commands.engine_builder.engine import get_engine

    opened_bundle = open_bundle(bundle)
    cache_of_servers = os.environ.get("SOPDEPLOY_ENGINE_CACHE")
    if options.cache is None and cache_of_servers:
        options = options.model_copy(update={"cache": Path(cache_of_servers)})

    # The converter of torch-tensorrt starts from the checkpoint, which not every bundle has.
    if options.via == "torch-tensorrt" and "network" in opened_bundle.manifest.config:
        message = f"{bundle}: holds a network of your own, which has no checkpoint to convert; omit via"
        raise EngineError(message)
    if options.via == "torch-tensorrt" and options.checkpoint is None:
        problem = "converts the program of the checkpoint that was exported"
        raise ConfigError(problem, setting="via", remedies={"checkpoint": None})

    if options.checkpoint is None:
        return get_engine(opened_bundle, options, on_step)

    # `EngineOptions` has a checkpoint with torch-tensorrt only.
    check_is_checkpoint(options.checkpoint)
    from sopdeploy_commands.engine_builder.from_program import build_from_program
    from sopdeploy_export.export_checkpoint import rebuild_program

    read_program = partial(rebuild_program, options.checkpoint, opened_bundle.manifest)
    return get_engine(
        opened_bundle,
        options,
        on_step,
        partial(build_from_program, opened_bundle, read_program),
    )
