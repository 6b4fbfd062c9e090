"""`sopdeploy predict` and `sopdeploy verify`: use and check a bundle without a server."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from sopdeploy.cli.console import (
    USER_ERROR,
    BundleArgument,
    JsonOption,
    one_line_errors,
    out,
    plain_text,
    print_error,
    print_field,
    print_json,
    steps,
)


def predict(
    bundle: BundleArgument,
    images: Annotated[list[Path], typer.Argument(help="Image files to classify.")],
    top_k: Annotated[int | None, typer.Option(min=1, help="Classes per image.")] = None,
    explain: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="PNG file to write: the image with the class activation map of its best class.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Classify image files without a server; the results equal those of the service.

    Example: [bold]sopdeploy predict bundles/dsop-resnet20-3f6c01d2a4b7 photo.jpg[/bold]
    """
    with one_line_errors(as_json):
        from sopdeploy_service.commands.predict import predict as run
        from sopdeploy_service.settings import load_settings

        predictions = run(bundle, images, load_settings(top_k=top_k), explain)
    if as_json:
        print_json([prediction.model_dump(mode="json") for prediction in predictions])
    for prediction in predictions:
        if prediction.error is not None:
            print_error(f"{prediction.image}: {prediction.error.detail}", prediction.error.code)
        elif not as_json:
            found = [f"{c.label} {c.probability:.4f}" for c in prediction.classes]
            classes = ", ".join(found) or "no class reaches its threshold"
            warnings = f" ({', '.join(prediction.warnings)})" if prediction.warnings else ""
            unknown = ""
            if prediction.known is not None:
                classes += f"; score {prediction.score:.4f}"
                unknown = "" if prediction.known else ", probably none of these classes"
            line = plain_text(f"{prediction.image}: {classes}")
            out.print(Text.assemble(line, (unknown, "yellow"), (warnings, "dim")))
    if any(prediction.error is not None for prediction in predictions):
        raise typer.Exit(USER_ERROR)


def replay_rules(bundle: Path) -> str | None:
    """Replay the rewrite rules of *bundle* if the packages that they need are installed."""
    try:
        from sopdeploy_export.replay import check_lowering
    except ImportError:  # without onnx_ir
        return None
    from sopdeploy.bundle.folder import open_bundle

    return check_lowering(open_bundle(bundle))


def verify(bundle: BundleArgument, as_json: JsonOption = False) -> None:
    """Check every file of a bundle, its probes and its golden examples on this machine, offline.

    Example: [bold]sopdeploy verify bundles/dsop-resnet20-3f6c01d2a4b7[/bold]
    """
    with one_line_errors(as_json), steps("verifying", quiet=as_json):
        from sopdeploy_service.commands.verify import verify as run

        result = run(bundle)
        lowering = replay_rules(bundle) if result.onnx_root is not None else None
    if as_json:
        print_json({**result.model_dump(mode="json"), "lowering": lowering})
        return
    print_field("files", f"{result.files} complete, {result.bytes:,} bytes, sha256 equal, id {result.id}")
    graph = "its root was not recomputed, because onnx is not installed: pip install onnx"
    if result.onnx_root is not None:
        graph = f"root {result.onnx_root[:16]}, recomputed from model.onnx: as exported"
    print_field("graph", graph)
    if lowering is not None:
        print_field("lowering", lowering)
    for replay in result.replays:
        for name, deviation in replay.deviation.items():
            print_field(
                "probes",
                f"batch {replay.batch}: {name} of {replay.images} images deviate by {deviation:.2g} "
                f"(allowed {replay.tolerance[name]:.2g}) on {result.runtime}",
            )
    if result.golden:
        same = "pixels and logits" if result.pixels is None else "logits"
        print_field("golden", f"{result.golden} JPEG files give the exporter's {same}")
    if result.pixels is not None:
        print_field("note", result.pixels.describe(), style="bold yellow")
    print_field("verified", str(result.bundle), style="bold green")
