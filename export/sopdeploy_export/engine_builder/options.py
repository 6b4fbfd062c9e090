"""Options of an engine build."""

from pathlib import Path
from typing import Literal

from sopdeploy.config import Options


class EngineOptions(Options):
    """Options of `sopdeploy engine`."""

    via: Literal["onnx", "torch-tensorrt"] = "onnx"
    """Converter: TensorRT's ONNX parser, or torch-tensorrt (of a bundle made with --pt2)."""
    profiles: str | None = None
    """Largest batch of each optimization profile, such as 1,8,32."""
    cache: Path | None = None
    """Engine cache folder; by default $SOPDEPLOY_ENGINE_CACHE, or engines/ next to the bundle."""
    rebuild: bool = False
    """Build even if the cache has one."""
    strict: bool = False
    """Fail if a layer may run in another precision than the graph's."""
