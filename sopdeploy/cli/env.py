"""`sopdeploy env`: what a report of a bug needs, without what nobody should read in it."""

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sopdeploy import __version__
from sopdeploy.cli.console import one_line_errors, out, plain, print_json
from sopdeploy.errors import RuntimeUnavailableError

PACKAGES = (
    "numpy", "pillow", "pydantic", "fastapi", "uvicorn", "torch", "torchvision", "timm", "onnx", "onnxscript",
    "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-cu12", "tensorrt-cu13", "cuda-python",
)  # fmt: skip
RELEVANT = re.compile(
    r"(SOPDEPLOY|OMP|MKL|KMP|CUDA|NVIDIA|NCCL|ORT|OTEL|TORCH|PYTORCH|SLURM)_|(PYTHON|LD_LIBRARY_)PATH$"
)
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|HEADERS|CREDENTIAL|AUTH|COOKIE", re.IGNORECASE)
HIDDEN = "(hidden)"


def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a script.")] = False) -> None:
    """Print what a report of a bug needs: versions, system, processor, GPU, environment; secrets are hidden.

    Example: [bold]sopdeploy env[/bold]
    """
    with one_line_errors(as_json):
        found = facts(os.environ)
    if as_json:
        print_json(found)
        return
    for section, values in found.items():
        out.print(f"[bold]{section}[/]")
        for name, value in values.items():
            out.print(f"  {plain(name):<20} {plain(str(value))}")


def facts(variables: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the sections of a report, each a table of name and value."""
    from sopdeploy.environment import installed, machine

    python = f"{platform.python_implementation()} {platform.python_version()}"
    return {
        "versions": {"sopdeploy": __version__, "python": python, **installed(PACKAGES)},
        "machine": {
            **machine(),
            "release": platform.release(),
            "libc": " ".join(platform.libc_ver()).strip(),
        },
        "accelerators": {"onnxruntime": onnxruntime_sees(), "tensorrt": tensorrt_sees()},
        "environment": shown(variables),
    }


def onnxruntime_sees() -> str:
    """Return the providers that ONNX Runtime was built with, or why it says none."""
    try:
        import onnxruntime
    except ImportError as problem:
        return f"none ({problem})"
    return ", ".join(onnxruntime.get_available_providers())


def tensorrt_sees() -> str:
    """Return TensorRT's version and the GPU that its runtime would use, or why there is none."""
    from sopdeploy.tensorrt.binding import import_tensorrt
    from sopdeploy.tensorrt.cuda import open_cuda

    try:
        version = import_tensorrt().__version__
        gpu = open_cuda().gpu()
    except RuntimeUnavailableError as problem:
        return f"none ({problem})"
    return f"{version} on {gpu.name}"


def shown(variables: Mapping[str, str]) -> dict[str, str]:
    """Return what matters of *variables*, sorted; secrets are hidden, the home folder is `~`."""
    return {name: harmless(name, variables[name]) for name in sorted(variables) if RELEVANT.match(name)}


def harmless(name: str, value: str) -> str:
    """Return *value* as others may read it: nothing secret by its name, no login, no name of a user."""
    if SECRET.search(name):
        return HIDDEN
    without_login = re.sub(r"(?<=://)[^/@\s]+@", f"{HIDDEN}@", value)
    return without_login.replace(str(Path.home()), "~") if len(Path.home().parts) > 1 else without_login
