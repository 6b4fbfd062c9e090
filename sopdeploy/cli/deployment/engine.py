"""`sopdeploy engine` and `sopdeploy triton`: what a bundle becomes on the machine that serves it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sopdeploy.cli.console import err, one_line_errors, out, plain, print_json

if TYPE_CHECKING:
    from sopdeploy_export.tensorrt.engine import Engine
    from sopdeploy_export.tensorrt.plan import EnginePlan, MemoryEstimate, ProgramFound

BundleArgument = Annotated[Path, typer.Argument(help="A bundle that `sopdeploy export` wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]

QUIET_SECONDS = 30.0  # between two lines of progress in a log
MEBI = 2**20


def engine(
    bundle: BundleArgument,
    precision: Annotated[
        str | None, typer.Option(help="Precision that the engine must have. [dim]default the bundle's[/dim]")
    ] = None,
    profiles: Annotated[
        str | None, typer.Option(metavar="1,8,32", help="Largest batch of each optimisation profile.")
    ] = None,
    level: Annotated[int, typer.Option(min=0, max=5, help="How long TensorRT searches.")] = 3,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for engines. [dim]default engines/ beside the bundle[/dim]")
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build even where the cache has it.")] = False,
    via: Annotated[
        str,
        typer.Option(help="Way to the plan: onnx, or torch-tensorrt from a bundle exported with --pt2."),
    ] = "onnx",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="What a build would do; needs no GPU."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Build, or find in the cache, the TensorRT engine of a bundle for this machine's GPU, with proof.

    Example: [bold]sopdeploy engine bundles/dsop-resnet20-3f6c01d2a4b7 --profiles 1,8,32[/bold]
    """
    with one_line_errors(as_json):
        needs_onnx()
        from sopdeploy.bundle.folder import open_bundle
        from sopdeploy_export.tensorrt.engine import EngineOptions, choose_via
        from sopdeploy_export.tensorrt.engine import engine as build
        from sopdeploy_export.tensorrt.plan import plan_engine

        options = EngineOptions(
            precision=precision,
            profiles=profiles,
            level=level,
            cache=cache,
            rebuild=rebuild,
            via=choose_via(via),
        )
        opened = open_bundle(bundle)
        if dry_run:
            planned = plan_engine(opened, options)
            return print_json(planned.model_dump(mode="json")) if as_json else show_plan(planned)
        with progress(quiet=as_json) as tell:
            built = build(opened, options, tell)
    return print_json(summary(built)) if as_json else show_engine(built)


def needs_onnx() -> None:
    """Say how to get onnx, which the lint reads graphs with, where it is missing."""
    from importlib.util import find_spec

    from sopdeploy.environment import install_hint
    from sopdeploy.errors import RuntimeUnavailableError

    if find_spec("onnx") is None:
        raise RuntimeUnavailableError(install_hint("onnx", "sopdeploy[tensorrt]"))


@contextmanager
def progress(*, quiet: bool) -> Iterator[Any]:
    """Give a function that is told how far a build is: a status on a terminal, a line at times in a log."""
    if quiet:
        yield lambda _: None
    elif err.is_terminal:
        with err.status("engine") as status:
            yield lambda text: status.update(plain(text))
    else:
        last = [float("-inf")]

        def tell(text: str) -> None:
            if time.monotonic() - last[0] >= QUIET_SECONDS:
                last[0] = time.monotonic()
                err.print(plain(text))

        yield tell


def summary(built: "Engine") -> dict[str, Any]:
    """Return what `--json` prints of an engine."""
    return {
        "plan": str(built.path),
        "built": built.reason is not None,
        "reason": built.reason,
        "record": built.record.model_dump(mode="json"),
    }


def show_engine(built: "Engine") -> None:
    """Print why the engine was built, what it is and what was measured on it."""
    record = built.record
    key = record.key
    out.print(f"[bold]engine[/]    {plain(key.gpu)} ({key.architecture}), TensorRT {key.tensorrt}")
    out.print(f"[bold]built[/]     {plain(built.reason or 'no, it was in the cache')}")
    out.print(f"[bold]profiles[/]  batches {', '.join(map(str, key.profiles))}")
    for hazard in record.hazards:
        out.print(f"[bold]rewritten[/] {hazard.operators} operators: {plain(hazard.done)}")
    for name, part in record.receipt.parts.items():
        found = ", ".join(f"{precision} in {count}" for precision, count in part.realised.items())
        out.print(
            f"[bold]precision[/] {plain(name)}: asked {', '.join(part.asked)}; layers: {found or 'fused'}"
        )
    for replay in record.replays:
        for name, deviation in replay.deviation.items():
            out.print(
                f"[bold]probes[/]    batch {replay.batch}: {plain(name)} deviates by {deviation:.2g} "
                f"(allowed {replay.tolerance[name]:.2g})"
            )
    out.print(f"[bold green]ready[/]     {plain(str(built.path))} ({record.plan_bytes:,} bytes)")


def show_plan(planned: "EnginePlan") -> None:
    """Print what a build would do."""
    out.print(f"[bold]bundle[/]    {plain(planned.bundle)}, {planned.precision}, by {planned.via}")
    out.print(f"[bold]profiles[/]  batches {', '.join(map(str, planned.profiles))}")
    if planned.program is not None:
        show_program(planned.program)
    if planned.memory is not None:
        show_memory(planned.memory)
    for result in planned.lint:
        words = [f"{hazard.operators} operators rewritten, {hazard.done}" for hazard in result.hazards]
        text = f"refused: {result.refused}" if result.refused else "; ".join(words) or "nothing to rewrite"
        out.print(f"[bold]lint[/]      TensorRT {result.tensorrt}: {plain(text)}")
    out.print(f"[bold]key[/]       {plain(planned.key or f'not known: {planned.key_unknown}')}")


def show_memory(memory: "MemoryEstimate") -> None:
    """Print what an engine takes of the GPU's memory."""
    activations = ", ".join(f"{m.activations / MEBI:.1f} at batch {m.batch}" for m in memory.profiles)
    out.print(
        f"[bold]memory[/]    about {memory.total / MEBI:.1f} MiB without workspace: weights "
        f"{memory.weights / MEBI:.1f}, activations {activations}"
    )


def show_program(program: "ProgramFound") -> None:
    """Print what torch-tensorrt would build, what it would be told, and whether it is here."""
    found = ", ".join(f"{name} {version}" for name, version in program.installed.items())
    out.print(f"[bold]program[/]   {program.file}, {program.bytes:,} bytes, sha256 {program.sha256[:16]}")
    out.print("[bold]told[/]      no TF32, no layer outside TensorRT, one profile over all batches")
    out.print(f"[bold]versions[/]  {plain('; '.join(filter(None, (found, program.missing))))}")
    out.print("[bold]checks[/]    the types of its layers, the probes in batches of both ends")


def triton(
    bundle: BundleArgument,
    repository: Annotated[Path, typer.Argument(help="Triton's model repository; made if it is missing.")],
    instances: Annotated[int, typer.Option(min=1, help="Copies of the model on each device.")] = 1,
    max_queue_delay: Annotated[
        int, typer.Option(min=0, help="Microseconds to wait for a fuller batch.")
    ] = 1000,
    as_json: Json = False,
) -> None:
    """Write a bundle into a Triton model repository: config, labels, warm-up and graph.

    Example: [bold]sopdeploy triton bundles/dsop-resnet20-3f6c01d2a4b7 models[/bold]
    """
    with one_line_errors(as_json):
        from sopdeploy.bundle.folder import open_bundle
        from sopdeploy_export.triton import TritonOptions, write_triton

        options = TritonOptions(instances=instances, max_queue_delay=max_queue_delay)
        written = write_triton(open_bundle(bundle), repository, options)
    if as_json:
        print_json(written.model_dump(mode="json"))
        return
    out.print(f"[bold]model[/]    {plain(written.name)}, batches of 1 to {written.max_batch}")
    out.print(f"[bold green]written[/]  {plain(str(written.path))}: {', '.join(written.files)}")
