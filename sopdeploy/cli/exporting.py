"""`sopdeploy export` and `sopdeploy verify`: from checkpoint to bundle, and is it whole."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sopdeploy.cli.console import one_line_errors, out, plain, print_json, steps

if TYPE_CHECKING:
    from sopdeploy_export.pipeline import Exported
    from sopdeploy_export.precision_report import PrecisionReport

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
    as_json: Json = False,
) -> None:
    """Turn a checkpoint into a bundle: detach, prove, lower to ONNX, compare, write.

    Example: [bold]sopdeploy export runs/photos/best.pt --detach[/bold]
    """
    with one_line_errors(), steps("exporting", quiet=as_json) as step:
        from sopdeploy.manifest import BatchRange
        from sopdeploy_export.int8 import choose_int8_for, choose_keep_float
        from sopdeploy_export.pipeline import ExportOptions
        from sopdeploy_export.pipeline import export as run
        from sopdeploy_export.precision import choose_calibration, choose_iteration, choose_precision
        from sopdeploy_export.ship import PrecisionOptions

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
        )
        exported = run(checkpoint, destination, options, step)
    if as_json:
        print_json(exported.summary())
    else:
        show(exported)


def show(exported: "Exported") -> None:
    """Print what was removed, proved and measured, on one screen."""
    certificate, parity = exported.certificate, exported.parity
    rows = {
        "removed": f"{', '.join(certificate.detached) or 'nothing'} "
        f"({len(certificate.removed)} tensors, {certificate.bytes_removed:,} bytes)",
        "kept": f"{len(certificate.kept)} tensors, sha256 equal before and after",
        "graph": f"trained = detached = plain, root {certificate.roots.any_batch[:16]} "
        f"({certificate.roots.operations} operations; also at batch 1, also as ONNX)",
        "logits": f"bitwise equal on {certificate.images} probe images",
        "onnx": f"{parity.file_bytes:,} bytes, {sum(parity.operators.values())} operators",
        "drift": f"{parity.logits.largest_drift:.2g} = {parity.logits.drift_in_floors:.1f} noise floors "
        f"(allowed {parity.logits.tolerance:.2g}), top class equal on {parity.top1.agree} of {parity.images}",
        "types": f"{exported.precision.precision}: "
        + ", ".join(f"{count} parts in {name}" for name, count in exported.precision.summary().items()),
        **cost_rows(exported.precision),
        "rules": rules_line(exported),
        "bundle": str(exported.path),
    }
    for name, text in rows.items():
        out.print(f"[bold]{name:8}[/] {plain(text)}")
    if parity.drift_allowed:
        out.print("[bold yellow]warning[/]  the numbers drift; the bundle records that this was allowed")


def cost_rows(precision: "PrecisionReport") -> dict[str, str]:
    """Return what the precision costs in answers, and the dearest layers, where it was measured."""
    rows = {}
    if precision.accuracy is not None:
        found = precision.accuracy
        top1 = "" if found.before is None else f"top-1 {found.before:.2%} before, {found.after:.2%} after; "
        rows["answers"] = (
            f"{top1}as float32 on {found.agree} of {found.images} pictures "
            f"({found.low:.1%} to {found.high:.1%})"
        )
    if precision.quantisation is not None:
        costs = ", ".join(f"{cost.part} {cost.share:.1%}" for cost in precision.quantisation.costs[:3])
        rows["dearest"] = costs or "no layer moves the logits"
    return rows


def rules_line(exported: "Exported") -> str:
    """Return which rules were applied, how often, and which forms were chosen."""
    report = exported.lowering
    rules = ", ".join(f"{name} ({times})" for name, times in report.summary.items()) or "none applies"
    forms = "; ".join(f"{choice.where}: {choice.form} ({choice.by})" for choice in report.choices)
    return f"{rules}; {forms}" if forms else rules


def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle that `sopdeploy export` wrote.")],
    as_json: Json = False,
) -> None:
    """Check every file of a bundle and replay its probes on this machine, offline.

    Example: [bold]sopdeploy verify bundles/dsop-resnet20-3f6c01d2a4b7[/bold]
    """
    with one_line_errors(), steps("verifying", quiet=as_json):
        from sopdeploy_service.verify import verify as run

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
