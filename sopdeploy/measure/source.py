"""What is to be measured, recognised by what it is: a file, a folder with a manifest, or an address."""

from pathlib import Path
from typing import Literal

from sopdeploy.errors import ConfigError

Kind = Literal["checkpoint", "bundle", "service"]


def recognise(source: str) -> Kind:
    """Return what *source* names; raises `ConfigError` where it is nothing that answers."""
    if source.startswith(("http://", "https://")):
        return "service"
    path = Path(source)
    if path.is_dir():
        if (path / "manifest.json").is_file():
            return "bundle"
        if (path / "best.pt").is_file():
            raise ConfigError(f"{source}: the folder of a run; give {path / 'best.pt'}")
        raise ConfigError(
            f"{source}: a folder without a manifest.json is no bundle; give a checkpoint, a bundle or a URL"
        )
    if "://" in source:
        raise ConfigError(f"{source}: only services on http:// and https:// can be measured")
    return "checkpoint"
