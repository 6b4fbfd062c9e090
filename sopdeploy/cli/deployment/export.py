"""`sopdeploy export`: convert a checkpoint to a bundle."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sopdeploy.cli.console import JsonOption, one_line_errors, print_json, steps
from sopdeploy.cli.deployment.export_summary import show
from sopdeploy.cli.deployment.inspect import (
    OWN,
    LogitsOption,
    NetworkOption,
    PreprocessOption,
    SettingsOption,
    TableOption,
)
from sopdeploy.errors import ConfigError


def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint of `sopdeploy train`, or with --network any weight file.")
    ],
    detach: Annotated[
        bool, typer.Option("--detach", help="Remove training-only branches and prove equivalence.")
    ] = False,
    destination: Annotated[Path, typer.Option("--out", help="Folder for the bundle.")] = Path("bundles"),
    max_batch: Annotated[int, typer.Option(min=1, help="Largest batch the bundle must accept.")] = 64,
    probes: Annotated[
        Path | None, typer.Option(help="Folder of images to compare on, in addition to generated ones.")
    ] = None,
    allow_drift: Annotated[
        bool, typer.Option("--allow-drift", help="Write the bundle despite numeric drift, and record it.")
    ] = False,
    precision: Annotated[
        Literal["fp32", "fp16", "bf16-backbone", "int8"], typer.Option(help="Precision of the graph.")
    ] = "fp32",
    newton_schulz: Annotated[
        Literal["fp32", "fp16"],
        typer.Option(help="Type of Newton-Schulz matrices; fp16 needs --precision fp16."),
    ] = "fp32",
    calibrate: Annotated[Path | None, typer.Option(help="Folder of images to calibrate int8 ranges.")] = None,
    calibration: Annotated[
        Literal["minmax", "entropy", "percentile"] | None,
        typer.Option(
            help="Calibration method for int8 ranges. [dim]default: the first that loses little enough[/dim]"
        ),
    ] = None,
    int8_for: Annotated[
        Literal["cpu", "tensorrt"] | None,
        typer.Option(help="Runtime to quantize for, with int8. [dim]default: cpu[/dim]"),
    ] = None,
    keep_float: Annotated[
        list[str] | None,
        typer.Option(help="Network part whose convolutions stay in float32, with int8; repeatable."),
    ] = None,
    evaluate: Annotated[
        Path | None, typer.Option(help="Folder of images by class, to compare top-1 with that in float32.")
    ] = None,
    max_drop: Annotated[
        float, typer.Option(min=0, help="Largest allowed loss of top-1 (or agreement), percentage points.")
    ] = 1.0,
    lowering: Annotated[
        bool,
        typer.Option(
            "--lowering/--no-lowering",
            help="Apply the rewrite rules, or export the certified graph as it is.",
        ),
    ] = True,
    autotune: Annotated[
        bool, typer.Option("--autotune", help="Time equivalent forms of a layer and choose the fastest.")
    ] = False,
    measure_speed: Annotated[
        bool,
        typer.Option(
            "--measure-speed",
            help="Time the graph against the plain backbone; report.html then differs between exports.",
        ),
    ] = False,
    pt2: Annotated[
        bool, typer.Option("--pt2", help="Also store the certified torch.export program in the bundle.")
    ] = False,
    with_cam: Annotated[
        bool,
        typer.Option(
            "--with-cam", help="Add class activation maps, which the service returns for explain=1."
        ),
    ] = False,
    network: NetworkOption = None,
    settings: SettingsOption = None,
    plain: Annotated[
        str | None,
        typer.Option(
            help="Builder of the network without training-only parts, package.module:callable.",
            rich_help_panel=OWN,
        ),
    ] = None,
    plain_settings: Annotated[
        list[str] | None,
        typer.Option("--plain-set", help="Option key=value of --plain; repeatable.", rich_help_panel=OWN),
    ] = None,
    training_only: Annotated[
        list[str] | None,
        typer.Option(help="Part to remove, or a pattern such as 'aux*'; repeatable.", rich_help_panel=OWN),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="File with one class name per line.", rich_help_panel=OWN)
    ] = None,
    preprocess: PreprocessOption = None,
    table: TableOption = None,
    logits: LogitsOption = None,
    allow_constants: Annotated[
        bool,
        typer.Option(
            "--allow-constants",
            help="Accept large tensors that are neither weights nor buffers, without --plain.",
            rich_help_panel=OWN,
        ),
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the model. [dim]default: that of the builder[/dim]", rich_help_panel=OWN),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Convert a checkpoint to a bundle: detach, prove equivalence, export to ONNX, compare, write.

    With --network, the file holds the weights of a network of your own, which is built by your code.

    Example: [bold]sopdeploy export runs/latest/best.pt --detach[/bold]
    """
    with one_line_errors(as_json), steps("exporting", quiet=as_json) as step:
        own: dict[str, Any] = {
            "--set": settings,
            "--plain": plain,
            "--plain-set": plain_settings,
            "--labels": labels,
        }
        own |= {
            "--training-only": training_only,
            "--preprocess": preprocess,
            "--weights": table,
            "--logits": logits,
            "--allow-constants": allow_constants,
            "--name": name,
        }
        given = [flag for flag, value in own.items() if value]
        if network is None and given:
            raise ConfigError(f"{given[0]}: only with --network, for a network of your own")
        from sopdeploy.api.deployment import export as run
        from sopdeploy.api.user_network import NetworkSource

        source = None
        if network is not None:
            source = NetworkSource(
                weights=checkpoint,
                network=network,
                settings=settings or (),
                plain=plain,
                plain_settings=plain_settings or (),
                training_only=training_only or (),
                labels=labels,
                preprocess=preprocess or "",
                table=table,
                logits=logits,
                allow_constants=allow_constants,
                name=name,
            )

        exported = run(
            checkpoint,
            destination,
            detach=detach,
            max_batch=max_batch,
            probes=probes,
            allow_drift=allow_drift,
            precision=precision,
            newton_schulz=newton_schulz,
            calibrate=calibrate,
            calibration=calibration,
            int8_for=int8_for,
            keep_float=keep_float or (),
            evaluate=evaluate,
            max_drop=max_drop,
            lowering=lowering,
            autotune=autotune,
            measure_speed=measure_speed,
            pt2=pt2,
            with_cam=with_cam,
            user_network=source,
            on_step=step,
        )
    if as_json:
        print_json(exported.summary())
    else:
        show(exported)
