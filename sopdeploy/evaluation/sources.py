"""Tell what an evaluation source is: a checkpoint, a bundle or a service."""

from pathlib import Path
from typing import Literal

from sopdeploy.errors import ConfigError


def detect_source(source: str) -> Literal["checkpoint", "bundle", "service"]:
    """Detect what *source* names; raises `ConfigError` if it cannot be evaluated."""
    if source.startswith(("http://", "https://")):
        return "service"
    path = Path(source)
    if path.is_dir():
        if (path / "manifest.json").is_file():
            return "bundle"
        if (path / "best.pt").is_file():
            raise ConfigError(f"{source}: is a run folder; give {path / 'best.pt'}")
        raise ConfigError(
            f"{source}: not a bundle, it has no manifest.json; give a checkpoint, a bundle or a URL"
        )
    if "://" in source:
        raise ConfigError(
            f"{source}: only services on http:// and https:// can be evaluated; write http://HOST:PORT"
        )
    return "checkpoint"
