"""`sopdeploy verify`: check a bundle on this machine."""

from typing import TYPE_CHECKING

from sopdeploy.cli.command import command
from sopdeploy.cli.console import BundleArgument, print_field, show_steps

if TYPE_CHECKING:
    from sopdeploy_service.commands.verify import Verification


def _show(result: "Verification") -> None:
    """Print one line per check."""
    print_field("files", f"{result.num_files} complete, {result.bytes:,} bytes, sha256 equal, id {result.id}")
    graph = "its root was not recomputed, because onnx is not installed: pip install onnx"
    if result.onnx_root is not None:
        graph = f"root {result.onnx_root[:16]}, recomputed from model.onnx: as exported"
    print_field("graph", graph)
    for replay in result.replays:
        for name, deviation in replay.deviation.items():
            allowed = f"(allowed {replay.tolerance[name]:.2g}) on {result.runtime}"
            images = f"batch {replay.batch}: {name} of {replay.num_images} images"
            print_field("probes", f"{images} deviate by {deviation:.2g} {allowed}")
    if result.golden:
        same = "pixels and logits" if result.pixels is None else "logits"
        print_field("golden", f"{result.golden} JPEG files give the exporter's {same}")
    pixels = () if result.pixels is None else (result.pixels.describe(),)
    for note in (*pixels, *result.notes):
        print_field("note", note, style="bold yellow")
    print_field("verified", str(result.bundle), style="bold green")


@command(_show)
def verify_command(bundle: BundleArgument) -> "Verification":
    """Check every file of a bundle, its probes and its golden examples on this machine, offline.

    Example: sopdeploy verify bundles/photos-3f6c01d2a4b7
    """
    with show_steps("verifying"):
        from sopdeploy_service.commands.verify import verify as run

        return run(bundle)
