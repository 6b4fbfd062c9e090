"""`sopdeploy predict`: classify images without a server, with the same code."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import pydantic
from numpy.typing import NDArray
from rich.text import Text

from sopdeploy.bundle.decision import Decision, have_answers
from sopdeploy.bundle.http_api import Classes, ClassProbability, Problem, name_classes
from sopdeploy.cli.command import as_data, command
from sopdeploy.cli.console import out, plain_text, print_error, print_json
from sopdeploy.data.photos.files import list_any_images
from sopdeploy.errors import DataError, ImageError
from sopdeploy.html.notebook import notebook_table
from sopdeploy.images.decode import decode
from sopdeploy.images.encode import (
    AnyImage,
    Buffer,
    check_is_image,
    encode_image,
    name_image,
    naming,
)
from sopdeploy.images.occlusion import GRID, occlude
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.paths import what_is
from sopdeploy_service.http.problems import describe_error
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.inference.results import NONFINITE, HttpError
from sopdeploy_service.runtime.base import translating_errors
from sopdeploy_service.settings import Settings, load_settings


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


class FilePredictions(tuple[FilePrediction, ...]):
    """The predictions of `predict`, one per image; `seconds` is the time that each took."""

    seconds: tuple[float, ...]

    def _repr_html_(self) -> str:
        """Show the two best classes of each image in a notebook."""
        rows = []
        for one in self:
            best = [f"{each.label} {100 * each.probability:.0f} %" for each in one.classes[:2]]
            error = "" if one.error is None else one.error.detail
            known = {None: "", True: "yes", False: "no"}[one.known]
            rows.append((one.image, ", ".join(best) or error, known))
        return notebook_table(f"{len(self):,} images", ["image", "classes", "known"], rows)


class Network(NamedTuple):
    """What predicts: a bundle, or a checkpoint without an export.

    `run` computes from pixels (1, H, W, 3) the logits (C,), None if an output is not finite.
    """

    labels: tuple[str, ...]
    preprocess: Preprocess
    rules: Decision
    run: Callable[[NDArray[np.uint8]], NDArray[np.float32] | None]

    @classmethod
    def of_bundle(cls, loaded: LoadedModel) -> "Network":
        """Run the file of a bundle by its runtime."""
        manifest = loaded.bundle.manifest
        logits_name = manifest.outputs[0].name

        def run(pixels: NDArray[np.uint8]) -> NDArray[np.float32] | None:
            with translating_errors(loaded.runtime):
                outputs = loaded.runtime.run(pixels)
            has_answer = have_answers(outputs[logits_name]).all()
            others = [values for key, values in outputs.items() if key != logits_name]
            if not has_answer or not all(np.isfinite(values).all() for values in others):
                return None
            return outputs[logits_name][0]

        return cls(tuple(loaded.bundle.labels), manifest.preprocess, manifest.rules, run)

    @classmethod
    def of_checkpoint(cls, path: Path) -> "Network":
        """Run the network of the checkpoint at *path* by PyTorch; raises `CheckpointError`."""
        import torch

        from sopdeploy.layers.normalize import Normalize, images_format
        from sopdeploy.weights.checkpoint import build_classifier, read_checkpoint

        checkpoint = read_checkpoint(path)
        network = build_classifier(checkpoint, path).eval()
        normalize = Normalize(checkpoint.preprocess, images_format(network))
        decision = Decision() if checkpoint.decision is None else checkpoint.decision

        def run(pixels: NDArray[np.uint8]) -> NDArray[np.float32] | None:
            with torch.no_grad():
                logits: NDArray[np.float32] = network(normalize(torch.tensor(pixels))).numpy()
            return logits[0] if have_answers(logits).all() else None

        rules = decision.for_trained_logits()
        return cls(checkpoint.labels, checkpoint.preprocess, rules, run)


def predict_one(
    network: Network,
    image: object,
    name: str,
    settings: Settings,
    *,
    explain: bool,
) -> FilePrediction:
    """Predict the classes of *image* in batches of one, under the *name* that the prediction shows.

    An image that cannot be used gets an `error`. If *explain*, the prediction has an
    explanation, for which occluded copies of the image are classified, too.
    """
    try:
        # Files and buffers have a limit. An array or PIL image has none: it is encoded here, so the
        # limit of `decode` is the length of *body* itself.
        body = encode_image(image, limit=settings.max_body_bytes, compress_level=0)
        decoded = decode(
            body,
            network.preprocess,
            max_bytes=len(body),
            max_pixels=settings.max_pixels,
        )
    except ImageError as error:
        return FilePrediction(
            image=name, error=describe_error(HttpError.from_image_error(error))
        )

    copies = occlude(decoded.pixels, network.preprocess) if explain else ()

    # Batches of one, as the image alone would be classified, also for the occluded copies.
    all_logits: list[NDArray[np.float32]] = []  # (C,) of the image, then of its occluded copies
    for pixels in (decoded.pixels, *copies):
        logits_C = network.run(pixels[None])
        if logits_C is None:
            return FilePrediction(image=name, error=describe_error(NONFINITE))
        all_logits.append(logits_C)

    # The classes of the image, and which cells its first class depends on.
    logits, *occluded = all_logits
    limit = settings.classes_per_image(multi_label=network.rules.is_multi_label)
    answer = network.rules.answer(
        logits, limit, occluded=np.stack(occluded) if explain else None
    )
    fields = name_classes(answer, network.labels, decoded.warnings)
    return FilePrediction.model_validate({"image": name, **fields})


def print_prediction(prediction: FilePrediction, seconds: float) -> None:
    """Print the classes of an image, the time that it took, and where it was explained, the most important cell."""
    ranked = [f"{each.label} {each.probability:.4f}" for each in prediction.classes]
    classes = ", ".join(ranked) or "no class reaches its threshold"
    notes = ", ".join([f"{1000 * seconds:.0f} ms", *prediction.warnings])
    unknown = "looks unlike the training photos; closest: " if prediction.known is False else ""

    image = plain_text(f"{prediction.image}:")
    out.print(
        Text.assemble(
            image, " ", (unknown, "yellow"), plain_text(classes), (f" ({notes})", "dim")
        )
    )
    if prediction.explanation is not None:
        # What the first class loses if a cell of the image is hidden.
        losses = np.array(prediction.explanation)
        row, column = np.unravel_index(losses.argmax(), losses.shape)

        cell = f"row {row + 1}, column {column + 1} of {GRID} x {GRID}"
        label = prediction.classes[0].label  # without a class there is no explanation
        loss = plain_text(
            f"{label} depends most on {cell}: without it, {losses.max():.4f} less"
        )
        out.print(Text.assemble("  ", loss))


def _show(predictions: FilePredictions, *, as_json: bool) -> int:
    """Print the predictions and the errors; the exit code is 2 if an image has an error."""
    if as_json:
        print_json(as_data(list(predictions)))
    for prediction, seconds in zip(predictions, predictions.seconds, strict=True):
        if prediction.error is not None:
            print_error(f"{prediction.image}: {prediction.error.detail}", prediction.error.code)
        elif not as_json:
            print_prediction(prediction, seconds)

    has_error = any(prediction.error is not None for prediction in predictions)
    return DataError.exit_code if has_error else 0


@command(
    _show,
    examples=(
        "sopdeploy predict bundles/photos-3f6c01d2a4b7 photo.jpg",
        "sopdeploy predict bundles/photos-3f6c01d2a4b7 folder/",
        "sopdeploy predict runs/latest/best.pt photo.jpg",
    ),
    keys=("explain", "runtime"),
)
def predict(
    bundle: str | Path,
    images: AnyImage | Iterable[AnyImage],
    *,
    top_k: int | None = None,
    explain: bool = False,
    runtime: str | None = None,
    **settings: Any,
) -> FilePredictions:
    """Classify image files without a server, with the same results as the service.

    Args:
        bundle: A bundle written by `sopdeploy export`, or the checkpoint of a run, best.pt, which PyTorch runs.
        images: Image files, and folders of them; in Python also what the client takes: bytes, files, PIL
            images, uint8 arrays (H, W, 3), (H, W, 4), (H, W), and (N, H, W, 3).
        top_k: Classes per image.
        explain: Also find the parts of the image on which its first class depends; takes 50 times as long.
        runtime: Runtime, as for `serve`; by default the setting.
        **settings: Settings of the server that apply to predictions, for example `threads=1`.

    Returns:
        One prediction per image, and in `seconds` the time that each took. A file that is not a valid image
        gets an `error`.

    Raises:
        DataError: A file cannot be read, or an array is not an image.
        BundleError: The bundle is damaged.
        ConfigError: Unknown or invalid settings.

    Examples:
        >>> bundle = "bundles/photos-3f6c01d2a4b7"
        >>> [prediction] = sopdeploy.predict(bundle, "photo.jpg", top_k=3)
        >>> len(prediction.classes)
        3
    """
    # The images, which are checked before the network is loaded.
    sources: list[Any] = []
    for number, argument in enumerate(images if _are_several(images) else [images]):
        if isinstance(argument, str | Path) and Path(argument).is_dir():
            sources += [
                Path(argument, os.fsdecode(name)) for name in list_any_images(Path(argument))
            ]
        else:
            with naming(name_image(argument, number), DataError):
                check_is_image(argument)
            sources.append(argument)

    # Their predictions; errors name the image.
    loaded_settings = load_settings(top_k=top_k, runtime=runtime, **settings)
    if what_is(Path(bundle)) == "checkpoint":
        network = Network.of_checkpoint(Path(bundle))
    else:
        network = Network.of_bundle(load_model(Path(bundle), loaded_settings))
    predictions = []
    seconds = []
    for number, source in enumerate(sources):
        name = name_image(source, number)
        started = time.perf_counter()
        with naming(name, DataError):
            prediction = predict_one(network, source, name, loaded_settings, explain=explain)
        predictions.append(prediction)
        seconds.append(time.perf_counter() - started)

    results = FilePredictions(predictions)
    results.seconds = tuple(seconds)
    return results


def _are_several(images: Any) -> TypeGuard[Iterable[Any]]:
    """Tell whether *images* is not a single image, but an iterable or an array (N, H, W, 3) of them."""
    if hasattr(images, "shape"):
        return len(images.shape) == 4
    is_file = isinstance(images, str | os.PathLike | Buffer) or hasattr(images, "read")
    return isinstance(images, Iterable) and not is_file
