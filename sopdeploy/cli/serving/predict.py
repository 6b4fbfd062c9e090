"""`sopdeploy predict` and `bench`: classify images without a server, and measure how long it takes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from sopdeploy.cli.command import command
from sopdeploy.cli.console import (
    USER_ERROR_EXIT_CODE,
    BundleArgument,
    JsonOption,
    out,
    plain_text,
    print_error,
    print_json,
    say,
    show_steps,
)
from sopdeploy.errors import ConfigError

if TYPE_CHECKING:
    from sopdeploy_service.commands.bench import Benchmark
    from sopdeploy_service.commands.predict import FilePrediction


def _show(prediction: "FilePrediction") -> None:
    """Print the classes of one image in one line."""
    entries = [f"{entry.label} {entry.probability:.4f}" for entry in prediction.classes]
    classes = ", ".join(entries) or "no class reaches its threshold"
    warnings = f" ({', '.join(prediction.warnings)})" if prediction.warnings else ""
    unknown = ""
    if prediction.known is not None:
        classes += f"; score {prediction.score:.4f}"
        unknown = "" if prediction.known else ", probably none of these classes"
    line = plain_text(f"{prediction.image}: {classes}")
    out.print(Text.assemble(line, (unknown, "yellow"), (warnings, "dim")))


@command()
def predict_command(
    bundle: BundleArgument,
    images: Annotated[list[Path], typer.Argument(help="Image files to classify.")],
    top_k: Annotated[int | None, typer.Option(min=1, help="Classes per image.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Classify image files without a server; the results equal those of the service.

    Example: sopdeploy predict bundles/photos-3f6c01d2a4b7 photo.jpg
    """
    from sopdeploy_service.commands.predict import predict_files as run
    from sopdeploy_service.settings import load_settings

    predictions = run(bundle, images, load_settings(top_k=top_k))
    if as_json:
        print_json([prediction.model_dump(mode="json") for prediction in predictions])
    for prediction in predictions:
        if prediction.error is not None:
            print_error(f"{prediction.image}: {prediction.error.detail}", prediction.error.code)
        elif not as_json:
            _show(prediction)
    if any(prediction.error is not None for prediction in predictions):
        raise typer.Exit(USER_ERROR_EXIT_CODE)


def _show_benchmark(result: "Benchmark") -> None:
    """Print the machine, and one line per batch size."""
    facts = {**result.machine, **result.versions}
    say(", ".join(f"{key} {value}" for key, value in facts.items()))
    say(f"{result.bundle} ({result.precision}) on {result.runtime}, {result.device}")
    for row in result.latencies:
        out.print(
            f"  batch {row.batch:<4} median {row.median_ms:9.2f} ms  p95 {row.p95_ms:9.2f}  "
            f"p99 {row.p99_ms:9.2f}  {row.images_per_s:10.1f} images/s  ({row.num_runs} runs)"
        )


@command(_show_benchmark)
def bench_command(
    bundle: BundleArgument,
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
) -> "Benchmark":
    """Measure latency (median, p95, p99) and images per second of a bundle on this machine, after a warm-up.

    SOPDEPLOY_RUNTIME and SOPDEPLOY_THREADS select the runtime and its CPU threads, as for `serve`.

    Example: sopdeploy bench bundles/photos-3f6c01d2a4b7 --batch 1,8
    """
    with show_steps("timing") as step:
        from sopdeploy_service.commands.bench import bench as run
        from sopdeploy_service.settings import load_settings

        return run(bundle, load_settings(), batch_sizes(batch), step)


def batch_sizes(text: str) -> tuple[int, ...]:
    """Parse batch sizes such as "1,8", without duplicates; raise `ConfigError` for other text."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and 0 < len(word) < 7 for word in words):
        raise ConfigError("not a list of batch sizes; write it as 1,8", setting="batch", value=text)
    return tuple(dict.fromkeys(int(word) for word in words))
