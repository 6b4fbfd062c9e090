"""`sopdeploy engine`: build the TensorRT engine of a bundle."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sopdeploy.cli.command import command
from sopdeploy.cli.console import BundleArgument, print_field, show_steps
from sopdeploy_export.options import EngineOptions

if TYPE_CHECKING:
    from sopdeploy_export.engine_builder.engine import Engine

_field = partial(print_field, width=9)


def _show(engine: "Engine") -> None:
    record = engine.record
    key = record.key
    _field("engine", f"{key.gpu} ({key.architecture}), TensorRT {key.tensorrt}")
    _field("built", engine.reason or "no, it was in the cache")
    _field("profiles", f"batches {', '.join(map(str, key.profiles))}")
    _field("precision", key.precision)
    for replay in record.replays:
        for name, deviation in replay.deviation.items():
            allowed = f"(allowed {replay.tolerance[name]:.2g})"
            _field("probes", f"batch {replay.batch}: {name} deviates by {deviation:.2g} {allowed}")
    _field("ready", f"{engine.path} ({record.plan_bytes:,} bytes)", style="bold green")


def _summarize(engine: "Engine") -> dict[str, Any]:
    """Build the JSON output."""
    record, is_new = engine.record.model_dump(mode="json"), engine.reason is not None
    return {"plan": str(engine.path), "built": is_new, "reason": engine.reason, "record": record}


@command(_show, summarize=_summarize)
def engine_command(bundle: BundleArgument, *, options: EngineOptions) -> "Engine":
    """Build the TensorRT engine of a bundle for this GPU, or find it in the cache, and check its outputs.

    Example: sopdeploy engine bundles/photos-3f6c01d2a4b7 --profiles 1,8,32
    """
    from sopdeploy.environment import import_optional
    from sopdeploy.errors import RuntimeUnavailableError

    import_optional("onnx", "onnx", "sopdeploy[tensorrt]", RuntimeUnavailableError)
    from sopdeploy.bundle.folder import open_bundle
    from sopdeploy_export.engine_builder.engine import get_engine

    opened = open_bundle(bundle)
    configured = os.environ.get("SOPDEPLOY_ENGINE_CACHE")  # where servers with this variable look
    if options.cache is None and configured:
        options = options.model_copy(update={"cache": Path(configured)})
    with show_steps("engine") as report:
        return get_engine(opened, options, report)
