"""`sopdeploy export` and `sopdeploy verify`: from checkpoint to bundle, and is it whole."""

from pathlib import Path
from typing import Annotated

import typer

from sopdeploy.cli.console import one_line_errors, out, print_json, steps
from sopdeploy.cli.deployment.export_summary import show

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint that `sopdeploy train` wrote.")],
    detach: Annotated[
        bool, typer.Option("--detach", help="Take off what only training needs, with proof.")
    ] = False,
    destination: Annotated[Path, typer.Option("--out", help="Folder for the bundle.")] = Path("bundles"),
    max_batch: Annotated[int, typer.Option(min=1, help="Largest batch the bundle must take.")] = 64,
    probes: Annotated[
        Path | None, typer.Option(help="Folder of pictures to compare on, beside the generated ones.")
    ] = None,
    allow_drift: Annotated[
        bool, typer.Option("--allow-drift", help="Write the bundle even if its numbers drift; recorded.")
    ] = False,
    precision: Annotated[
        str, typer.Option(help="Types in the graph: fp32, fp16, bf16-backbone or int8.")
    ] = "fp32",
    newton_schulz: Annotated[
        str, typer.Option("--newton-schulz", help="Newton-Schulz with --precision fp16: fp32 or fp16.")
    ] = "fp32",
    calibrate: Annotated[Path | None, typer.Option(help="Pictures to read int8 ranges off.")] = None,
    calibration: Annotated[
        str, typer.Option(help="How ranges are found: minmax, entropy or percentile.")
    ] = "percentile",
    int8_for: Annotated[
        str | None, typer.Option(help="Runtime whose form of int8 is written: cpu or tensorrt. default cpu")
    ] = None,
    keep_float: Annotated[
        list[str] | None,
        typer.Option(help="A part whose convolutions stay in float32, with int8; repeat it."),
    ] = None,
    evaluate: Annotated[
        Path | None, typer.Option(help="Pictures by class, to measure top-1 before and after.")
    ] = None,
    max_drop: Annotated[
        float, typer.Option(min=0, help="Points of top-1 (or of agreement) that may be lost.")
    ] = 1.0,
    lowering: Annotated[
        bool,
        typer.Option(
            "--lowering/--no-lowering",
            help="Rewrite by proved rules, or write the papers' formulas as they are.",
        ),
    ] = True,
    autotune: Annotated[
        bool, typer.Option("--autotune", help="Time equal forms here instead of using the rule of thumb.")
    ] = False,
    measure_speed: Annotated[
        bool,
        typer.Option(
            "--measure-speed",
            help="Time it against the plain backbone here; report.html is then another at each export.",
        ),
    ] = False,
    pt2: Annotated[
        bool,
        typer.Option("--pt2", help="Put the certified program of torch.export into the bundle, too."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint into a bundle: detach, prove, lower to ONNX, compare, write.

    Example: [bold]sopdeploy export runs/photos-dsop/best.pt --detach[/bold]
    """
    with one_line_errors(as_json), steps("exporting", quiet=as_json) as step:
        from sopdeploy.bundle.manifest import BatchRange
        from sopdeploy_export.pipeline import ExportOptions
        from sopdeploy_export.pipeline import export as run
        from sopdeploy_export.precision.casts import choose_calibration, choose_iteration, choose_precision
        from sopdeploy_export.precision.convert import PrecisionOptions
        from sopdeploy_export.precision.int8 import choose_int8_for, choose_keep_float

        batch = BatchRange(optimum=min(8, max_batch), maximum=max_batch)
        chosen = PrecisionOptions(
            precision=(kind := choose_precision(precision)),
            newton_schulz=choose_iteration(newton_schulz, kind),
            calibrate=calibrate,
            calibration=choose_calibration(calibration),
            int8_for=choose_int8_for(int8_for, kind),
            keep_float=choose_keep_float(keep_float or [], kind),
            evaluate=evaluate,
            max_drop=max_drop,
        )
        options = ExportOptions(
            detach=detach,
            batch=batch,
            probes=probes,
            allow_drift=allow_drift,
            lowering=lowering,
            autotune=autotune,
            precision=chosen,
            measure_speed=measure_speed,
            pt2=pt2,
        )
        exported = run(checkpoint, destination, options, step)
    if as_json:
        print_json(exported.summary())
    else:
        show(exported)


def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle that `sopdeploy export` wrote.")],
    as_json: Json = False,
) -> None:
    """Check every file of a bundle and replay its probes on this machine, offline.

    Example: [bold]sopdeploy verify bundles/dsop-resnet20-3f6c01d2a4b7[/bold]
    """
    with one_line_errors(as_json), steps("verifying", quiet=as_json):
        from sopdeploy_service.commands.verify import verify as run

        found = run(bundle)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    out.print(f"[bold]files[/]    {found.files} whole, {found.bytes:,} bytes, id {found.id}")
    for replay in found.replays:
        for name, deviation in replay.deviation.items():
            out.print(
                f"[bold]probes[/]   batch {replay.batch}: {name} of {replay.images} images deviate by "
                f"{deviation:.2g} (allowed {replay.tolerance[name]:.2g}) on {found.runtime}"
            )
    out.print(f"[bold green]verified[/] {found.bundle}")
