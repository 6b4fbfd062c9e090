"""What onnxruntime's TensorRT provider is told: precision, batches, where its engines lie.

It builds engines by itself when it first meets a graph, minutes long, and keeps them in a folder; whether
they compute the bundle's network is shown by the probes, which run before the server is ready. `sopdeploy
engine` proves more: precision by part, every profile, the plan's hash before it is loaded.
"""

from pathlib import Path

from sopdeploy.bundle import Bundle
from sopdeploy.engines.cache import cache_folder
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy_service.settings import Settings

FOLDER = "onnxruntime-tensorrt"
TYPES = {"fp16": "trt_fp16_enable", "bf16-backbone": "trt_bf16_enable", "int8": "trt_int8_enable"}


def provider_options(bundle: Bundle, settings: Settings) -> dict[str, str]:
    """Return the provider's options for *bundle*: its precision, its batches, a folder of its own.

    The cache's folder is named by the bundle, id included. Raises `RuntimeUnavailableError` where it cannot
    be made.
    """
    folder = made(cache_folder(bundle, settings.engine_cache) / FOLDER)
    batch, name = bundle.manifest.batch, bundle.manifest.inputs[0].name
    sizes = {"min": batch.minimum, "opt": batch.optimum, "max": batch.maximum}
    image = "x".join(map(str, bundle.manifest.image_shape))
    return {
        "device_id": "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        **{option: str(int(kind == bundle.manifest.precision)) for kind, option in TYPES.items()},
        **{f"trt_profile_{which}_shapes": f"{name}:{size}x{image}" for which, size in sizes.items()},
    }


def made(folder: Path) -> Path:
    """Return *folder*, which is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise RuntimeUnavailableError(
            f"{folder}: cannot be made ({problem.strerror}); set SOPDEPLOY_ENGINE_CACHE to another folder"
        ) from problem
    return folder
