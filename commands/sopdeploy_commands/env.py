"""`sopdeploy env`: system information for bug reports."""

import platform
from collections.abc import Mapping

from rich.text import Text

from sopdeploy.cli.command import command
from sopdeploy.cli.console import out, plain_text
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy.version import __version__

_PACKAGES = (
    "numpy", "pillow", "pydantic", "fastapi", "uvicorn", "torch", "torchvision", "timm", "onnx", "onnxscript",
    "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-cu13", "cuda-python",
)  # fmt: skip


@command(examples=("sopdeploy env",))
def env() -> None:
    """Print versions, system, processor, GPU and plug-ins for a bug report."""
    from sopdeploy.base.environment import installed, machine
    from sopdeploy.base.plugins import describe_distribution, installed_plugins

    modules: dict[str, list[str]] = {}  # of plug-ins, by distribution; not imported
    for point in installed_plugins():
        modules.setdefault(describe_distribution(point), []).append(point.module)
    python = f"{platform.python_implementation()} {platform.python_version()}"
    libc = " ".join(platform.libc_ver()).strip()

    sections: dict[str, Mapping[str, object]] = {
        "versions": {"sopdeploy": __version__, "python": python, **installed(_PACKAGES)},
        "machine": {**machine(), "release": platform.release(), "libc": libc},
        "accelerators": describe_accelerators(),
        "plug-ins": {name: ", ".join(names) for name, names in modules.items()},
    }

    for section, values in sections.items():
        out.print(Text(section, "bold"))
        for name, value in values.items():
            out.print(
                Text.assemble("  ", f"{plain_text(name).plain:<20} ", plain_text(str(value)))
            )


def describe_accelerators() -> dict[str, str]:
    """Describe ONNX Runtime's execution providers, and TensorRT's version and GPU or why there is none."""
    try:
        import onnxruntime

        providers = ", ".join(onnxruntime.get_available_providers())
    except ImportError as error:
        providers = f"none ({error})"
    try:
        from sopdeploy_service.runtime.tensorrt_session import import_tensorrt, open_cuda

        device = f"{import_tensorrt().__version__} on {open_cuda().gpu().name}"
    except RuntimeUnavailableError as error:
        device = f"none ({error})"
    return {"onnxruntime": providers, "tensorrt": device}
