"""Classify and serve without torch: `sopdeploy.predict` and `sopdeploy.serve`."""

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.errors import ConfigError, DataError
from sopdeploy_service.commands.predict import FilePrediction, predict_files
from sopdeploy_service.server.background import BackgroundServer
from sopdeploy_service.server.process import run_server
from sopdeploy_service.settings import load_settings

AnyImage: TypeAlias = str | Path | Image.Image | NDArray[np.uint8]


def predict(
    bundle: str | Path,
    images: AnyImage | Iterable[AnyImage],
    *,
    top_k: int | None = None,
    **settings: Any,
) -> tuple[FilePrediction, ...]:
    """Classify images without a server; the results equal those of the service.

    The parameters and defaults are those of `sopdeploy predict`.

    Args:
        bundle: A bundle written by `sopdeploy.export`.
        images: One image or several: paths, PIL images, and uint8 arrays of shape (H, W), (H, W, 3) for RGB,
            (H, W, 4) for RGBA, or (N, H, W, 3).
        top_k: Classes per image.
        **settings: Settings of the server that apply to predictions, for example `threads=1`.

    Returns:
        One prediction per image. A file that is no valid image gets an `error`.

    Raises:
        DataError: A file cannot be read, or an array is no image.
        BundleError: The bundle is damaged.
        ConfigError: Unknown or invalid settings.
    """
    single = isinstance(images, str | Path | Image.Image) or (
        isinstance(images, np.ndarray) and images.ndim < 4
    )
    items: Iterable[Any] = [images] if single else images  # type: ignore[assignment]
    opened = [_open(image, number) for number, image in enumerate(items)]
    return tuple(predict_files(Path(bundle), opened, load_settings(top_k=top_k, **settings)))


def _open(image: object, number: int) -> Path | Image.Image:
    if isinstance(image, str | Path):
        return Path(image)
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise DataError(f"image {number}: a PIL image without pixels {image.size}; give another")
        return image
    if not isinstance(image, np.ndarray):
        raise DataError(f"image {number}: a {type(image).__name__}; give a path, a PIL image or an array")
    has_image_shape = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
    if image.dtype != np.uint8 or not has_image_shape or 0 in image.shape:
        raise DataError(
            f"image {number}: {image.dtype} array {image.shape}; give uint8 (H, W), (H, W, 3) or (H, W, 4)"
        )
    return Image.fromarray(image)


@overload
def serve(
    bundles: str | Path | Sequence[str | Path],
    *,
    background: Literal[False] = False,
    config: str | Path | None = None,
    **settings: Any,
) -> int: ...
@overload
def serve(
    bundles: str | Path | Sequence[str | Path],
    *,
    background: Literal[True],
    config: str | Path | None = None,
    **settings: Any,
) -> BackgroundServer: ...
def serve(
    bundles: str | Path | Sequence[str | Path],
    *,
    background: bool = False,
    config: str | Path | None = None,
    **settings: Any,
) -> int | BackgroundServer:
    """Serve bundles over HTTP: POST an image to /v1/classify.

    The settings and defaults are those of `sopdeploy serve`.

    Args:
        bundles: One or several of: a bundle, a folder of bundles, or `NAME=BUNDLE`.
        background: Serve in another process, and return when the port is open. Otherwise serve in this
            process until SIGTERM or SIGINT.
        config: TOML file with settings.
        **settings: Settings, for example `port=8000` (0 selects a free port), `host`, `threads`.

    Returns:
        In the background a server with `url`, `log` and `stop()`, which a `with` statement stops. Otherwise
        the exit code: 0 after a drain, 70 if a runtime died.

    Raises:
        ConfigError: Invalid settings, the port is in use, or the server would block an event loop.
        BundleError: A bundle is damaged.
        SopdeployError: No runtime can run a bundle, or its outputs differ from its probes.
    """
    sources = [bundles] if isinstance(bundles, str | Path) else list(bundles)
    loaded = load_settings(None if config is None else Path(config), **settings)
    if background:
        return BackgroundServer(sources, loaded)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return run_server(sources, loaded)
    raise ConfigError("serve: an event loop runs in this thread, as in a notebook; use background=True")
