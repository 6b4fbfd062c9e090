"""`sopdeploy predict`: classify images without a server, with the same code."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pydantic
from numpy.typing import NDArray
from PIL import Image
from rich.text import Text

from sopdeploy.cli.command import as_data, command
from sopdeploy.cli.console import out, plain_text, print_error, print_json
from sopdeploy.errors import DataError, ImageError
from sopdeploy.files import open_regular, read_at_most
from sopdeploy.http_api import Classes, ClassProbability, Problem
from sopdeploy.images.decode import Decoded, decode
from sopdeploy.images.occlusion import GRID, occlude
from sopdeploy.images.pixels import correct_transparency_info, list_changes, preprocess_image
from sopdeploy.images.signatures import has_image_suffix
from sopdeploy.photos.folder import open_any_images
from sopdeploy_service.http.problems import describe_error
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.inference.results import NONFINITE, HttpError
from sopdeploy_service.runtime.base import translating_errors
from sopdeploy_service.settings import Settings, load_settings

AnyImage: TypeAlias = str | Path | Image.Image | NDArray[np.uint8]


class FilePrediction(Classes):
    """The most probable classes of one image, best first, or the error; `image` is its path or position."""

    image: str
    classes: tuple[ClassProbability, ...] = ()
    error: Problem | None = None

    @pydantic.model_serializer(mode="wrap")
    def _omit_unset(self, dump: pydantic.SerializerFunctionWrapHandler) -> dict[str, object]:
        """Omit the fields that are None, except `error`."""
        return {
            key: value
            for key, value in dump(self).items()
            if value is not None or key == "error"
        }


def predict_one(
    loaded: LoadedModel,
    image: bytes | Image.Image,
    name: str,
    settings: Settings,
    *,
    explain: bool,
) -> FilePrediction:
    """Predict the classes of *image*, in batches of one; one that cannot be used gets an `error`."""
    manifest = loaded.bundle.manifest
    try:
        decoded = _decode(image, loaded, settings)
    except ImageError as error:
        return FilePrediction(
            image=name, error=describe_error(HttpError.from_image_error(error))
        )
    copies = occlude(decoded.pixels, manifest.preprocess) if explain else ()
    all_logits: list[NDArray[np.float32]] = []  # (C,) of the image, then of its occluded copies
    for pixels in (decoded.pixels, *copies):
        with translating_errors(loaded.runtime):
            outputs = loaded.runtime.run(pixels[None])
        if not all(np.isfinite(values).all() for values in outputs.values()):
            return FilePrediction(image=name, error=describe_error(NONFINITE))
        all_logits.append(outputs[manifest.outputs[0].name][0])
    logits, *occluded = all_logits
    limit = settings.classes_per_image(multi_label=manifest.rules.is_multi_label)
    answer = manifest.rules.answer(
        logits, limit, occluded=np.stack(occluded) if explain else None
    )
    return FilePrediction(
        image=name, warnings=decoded.warnings, **answer.fields(loaded.bundle.labels)
    )


def _decode(image: bytes | Image.Image, loaded: LoadedModel, settings: Settings) -> Decoded:
    preprocess = loaded.bundle.manifest.preprocess
    if isinstance(image, bytes):
        return decode(
            image, preprocess, max_bytes=settings.max_body_bytes, max_pixels=settings.max_pixels
        )
    try:
        correct_transparency_info(image)  # as `decode` does for the bytes of a file
        return Decoded(preprocess_image(image, preprocess), list_changes(image, preprocess))
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError("the image is damaged", code="damaged_image", status=422) from error


def read_image(path: Path, max_bytes: int) -> bytes:
    """Read at most one byte more than *max_bytes*: enough to reject a larger file."""
    try:
        # A path with the extension of an image must be a regular file: `photos/*` can match a
        # FIFO, on which reading may wait forever. Other paths, such as /dev/stdin or
        # <(command), may be pipes.
        with open_regular(path) if has_image_suffix(path.name) else path.open("rb") as file:
            return read_at_most(file, max_bytes + 1)
    except OSError as error:
        reason = f"cannot be read ({error.strerror}); name an image file, or a folder of images"
        raise DataError(f"{path}: {reason}") from error


def print_prediction(prediction: FilePrediction) -> None:
    """Print the classes of an image and, if they are explained, the cell on which the first depends most."""
    ranked = [f"{each.label} {each.probability:.4f}" for each in prediction.classes]
    classes = ", ".join(ranked) or "no class reaches its threshold"
    warnings = f" ({', '.join(prediction.warnings)})" if prediction.warnings else ""
    unknown = (
        "looks unlike the training photographs; closest: " if prediction.known is False else ""
    )
    image = plain_text(f"{prediction.image}:")
    out.print(
        Text.assemble(image, " ", (unknown, "yellow"), plain_text(classes), (warnings, "dim"))
    )
    if prediction.explanation is not None:
        losses = np.array(
            prediction.explanation
        )  # of the first class, if a cell of the image is hidden
        row, column = np.unravel_index(losses.argmax(), losses.shape)
        cell = f"row {row + 1}, column {column + 1} of {GRID} x {GRID}"
        label = prediction.classes[0].label  # without a class there is no explanation
        loss = plain_text(
            f"{label} depends most on {cell}: without it, {losses.max():.4f} less"
        )
        out.print(Text.assemble("  ", loss))


def _show(predictions: Sequence[FilePrediction], *, as_json: bool) -> int:
    """Print the predictions and the errors; the exit code is 2 if an image has an error."""
    if as_json:
        print_json(as_data(list(predictions)))
    for prediction in predictions:
        if prediction.error is not None:
            print_error(f"{prediction.image}: {prediction.error.detail}", prediction.error.code)
        elif not as_json:
            print_prediction(prediction)
    return (
        DataError.exit_code
        if any(prediction.error is not None for prediction in predictions)
        else 0
    )


@command(_show)
def predict(
    bundle: str | Path,
    images: AnyImage | Iterable[AnyImage],
    *,
    top_k: int | None = None,
    explain: bool = False,
    runtime: str | None = None,
    **settings: Any,
) -> tuple[FilePrediction, ...]:
    """Classify image files without a server; the results equal those of the service.

    Example: sopdeploy predict bundles/photos-3f6c01d2a4b7 photo.jpg

    Example: sopdeploy predict bundles/photos-3f6c01d2a4b7 folder/

    Args:
        bundle: A bundle written by `sopdeploy export`.
        images: Image files, and folders of them; in Python also PIL images, and uint8 arrays (H, W),
            (H, W, 3 or 4), (N, H, W, 3).
        top_k: Classes per image.
        explain: Also find the parts of the image on which its first class depends; takes 50 times as long.
        runtime: Runtime, as for `serve`; by default the setting.
        **settings: Settings of the server that apply to predictions, for example `threads=1`.

    Returns:
        One prediction per image. A file that is no valid image gets an `error`.

    Raises:
        DataError: A file cannot be read, or an array is no image.
        BundleError: The bundle is damaged.
        ConfigError: Unknown or invalid settings.
    """
    is_single_array = isinstance(images, np.ndarray) and images.ndim < 4
    is_single = is_single_array or isinstance(images, str | Path | Image.Image)
    arguments: Iterable[Any] = [images] if is_single else images  # type: ignore[assignment]
    sources: list[Path | Image.Image] = []
    for number, argument in enumerate(arguments):
        source = _to_path_or_image(argument, number)
        if isinstance(source, Path) and source.is_dir():
            files = open_any_images(source)
            sources += [files.path(index) for index in range(len(files))]
        else:
            sources.append(source)
    for source in sources:
        if isinstance(source, Path):
            is_pipe = source.exists() and not source.is_file()  # what is read from it is gone
            if not is_pipe or has_image_suffix(source.name):
                read_image(source, max_bytes=0)  # raises an error before the network is loaded
    loaded_settings = load_settings(top_k=top_k, runtime=runtime, **settings)
    loaded = load_model(Path(bundle), loaded_settings)
    predictions = []
    for number, source in enumerate(sources):
        image: bytes | Image.Image
        if isinstance(source, Path):
            name, image = str(source), read_image(source, loaded_settings.max_body_bytes)
        else:  # `Image.open` sets the name of the file
            name, image = str(getattr(source, "filename", "") or f"image {number}"), source
        predictions.append(predict_one(loaded, image, name, loaded_settings, explain=explain))
    return tuple(predictions)


def _to_path_or_image(image: object, number: int) -> Path | Image.Image:
    """Convert a text to a path, an array to an image; raises `DataError` about image *number*."""
    if isinstance(image, str | Path):
        return Path(image)
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise DataError(
                f"image {number}: a PIL image without pixels {image.size}; give another"
            )
        return image
    description = type(image).__name__
    if isinstance(image, np.ndarray):
        has_image_shape = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
        if image.dtype == np.uint8 and has_image_shape and 0 not in image.shape:
            return Image.fromarray(image)
        description = f"{image.dtype} array {image.shape}"
    expected = "a path, a PIL image, or a uint8 array (H, W), (H, W, 3) or (H, W, 4)"
    raise DataError(f"image {number}: {description}; give {expected}")
