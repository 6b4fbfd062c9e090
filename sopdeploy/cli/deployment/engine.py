"""`sopdeploy engine`: build the TensorRT engine of a bundle for the GPU of this machine."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sopdeploy.cli.console import (
    BundleArgument,
    JsonOption,
    err,
    one_line_errors,
    plain_text,
    print_field,
    print_json,
)

if TYPE_CHECKING:
    from sopdeploy_export.tensorrt.engine import Engine
    from sopdeploy_export.tensorrt.plan import EnginePlan

LOG_INTERVAL = 30.0  # seconds between two progress lines in a log
_field = partial(print_field, width=9)


def engine(
    bundle: BundleArgument,
    precision: Annotated[
        str | None, typer.Option(help="Required precision of the engine. [dim]default: the bundle's[/dim]")
    ] = None,
    profiles: Annotated[
        str | None, typer.Option(metavar="1,8,32", help="Largest batch of each optimization profile.")
    ] = None,
    level: Annotated[int, typer.Option(min=0, max=5, help="TensorRT builder optimization level.")] = 3,
    cache: Annotated[
        Path | None, typer.Option(help="Engine cache folder. [dim]default: engines/ beside the bundle[/dim]")
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build even if the cache has one.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail if a layer may run in another precision than requested.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what a build would do; needs no GPU.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Build the TensorRT engine of a bundle for this GPU, or find it in the cache, and check its outputs.

    Example: [bold]sopdeploy engine bundles/dsop-resnet20-3f6c01d2a4b7 --profiles 1,8,32[/bold]
    """
    with one_line_errors(as_json):
        from sopdeploy.environment import import_optional
        from sopdeploy.errors import RuntimeUnavailableError

        import_optional("onnx", "onnx", "sopdeploy[tensorrt]", RuntimeUnavailableError)
        from sopdeploy.bundle.folder import open_bundle
        from sopdeploy_export.tensorrt.engine import EngineOptions, get_engine
        from sopdeploy_export.tensorrt.plan import plan_engine

        options = EngineOptions(
            precision=precision, profiles=profiles, level=level, cache=cache, rebuild=rebuild, strict=strict
        )
        opened = open_bundle(bundle)
        if dry_run:
            plan = plan_engine(opened, options)
            return print_json(plan.model_dump(mode="json")) if as_json else _show_plan(plan)
        with _progress(quiet=as_json) as report:
            built = get_engine(opened, options, report)
    if not as_json:
        return _show_engine(built)
    record = built.record.model_dump(mode="json")
    is_new = built.reason is not None
    return print_json({"plan": str(built.path), "built": is_new, "reason": built.reason, "record": record})


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Any]:
    """Yield a progress callback: a status line on a terminal, a line every `LOG_INTERVAL` s in a log."""
    if quiet:
        yield lambda _: None
    elif err.is_terminal:
        with err.status("engine") as status:
            yield lambda text: status.update(plain_text(text))
    else:
        last = float("-inf")

        def report(text: str) -> None:
            nonlocal last
            if time.monotonic() - last >= LOG_INTERVAL:
                last = time.monotonic()
                err.print(plain_text(text))

        yield report


def _show_engine(built: "Engine") -> None:
    record = built.record
    key = record.key
    _field("engine", f"{key.gpu} ({key.architecture}), TensorRT {key.tensorrt}")
    _field("built", built.reason or "no, it was in the cache")
    _field("profiles", f"batches {', '.join(map(str, key.profiles))}")
    for hazard in record.hazards:
        _field("rewritten", f"{hazard.operators} operators: {hazard.done}")
    for name, part in record.receipt.parts.items():
        layers = ", ".join(f"{precision} in {count}" for precision, count in part.actual.items())
        _field("precision", f"{name}: requested {', '.join(part.requested)}; layers: {layers or 'fused'}")
    for warning in record.receipt.warnings:
        _field("warning", warning, style="yellow")
    for replay in record.replays:
        for name, deviation in replay.deviation.items():
            bound = replay.tolerance[name]
            _field(
                "probes", f"batch {replay.batch}: {name} deviates by {deviation:.2g} (allowed {bound:.2g})"
            )
    _field("ready", f"{built.path} ({record.plan_bytes:,} bytes)", style="bold green")


def _show_plan(plan: "EnginePlan") -> None:
    _field("bundle", f"{plan.bundle}, {plan.precision}")
    _field("profiles", f"batches {', '.join(map(str, plan.profiles))}")
    for result in plan.lint:
        rewrites = [f"{hazard.operators} operators rewritten, {hazard.done}" for hazard in result.hazards]
        text = f"refused: {result.refused}" if result.refused else "; ".join(rewrites) or "nothing to rewrite"
        _field("lint", f"TensorRT {result.tensorrt}: {text}")
    _field("key", plan.key or f"not known: {plan.key_unknown}")
