"""TensorRT on the GPU, with a checked engine from the cache; never builds one."""

import logging
from importlib.util import find_spec
from pathlib import Path
from shlex import quote

from sopdeploy.bundle.folder import Bundle
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy_service.runtime.base import OwnRuntime
from sopdeploy_service.runtime.tensorrt_cache import (
    EMPTY,
    cache_folder,
    key_fields,
    load_engine,
    read_records,
)
from sopdeploy_service.runtime.tensorrt_session import EngineSession, import_tensorrt, open_cuda
from sopdeploy_service.settings import Settings

log = logging.getLogger("sopdeploy.service")


class TensorRTRuntime(EngineSession, OwnRuntime):
    """The engine of a bundle on this machine's first GPU."""

    setting = "tensorrt"
    title = "TensorRT"
    extra = "tensorrt"
    needs_gpu = True
    device = "cuda:0"

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        """Load the engine of *bundle* from the cache."""
        trt = import_tensorrt()
        cuda = open_cuda()
        self.name = f"tensorrt {trt.__version__}"

        # Take the first folder with an engine that was built for this bundle and this machine.
        fields = key_fields(bundle, str(trt.__version__), cuda.gpu())
        reasons: list[str] = []  # of each folder without an engine that can be used
        for folder in engine_folders(bundle, settings):
            engine = load_engine(folder, fields)
            if isinstance(engine, str):  # the reason why there is none
                reasons.append(engine)
                continue
            self.accepted_errors = engine.record.accepted_errors
            super().__init__(trt, cuda, engine.plan, bundle.manifest, engine.record.key)
            return

        reason = reasons[0] if reasons else EMPTY
        raise RuntimeUnavailableError(
            f"{reason}; run: sopdeploy engine {quote(str(bundle.path))}"
        )

    @staticmethod
    def is_set_up() -> bool:
        """Tell whether TensorRT is installed."""
        return find_spec("tensorrt") is not None

    @classmethod
    def reason_for_auto(cls, bundle: Bundle, settings: Settings) -> str | None:
        """Name the folders that contain engines of *bundle*; None without such folders or TensorRT."""
        folders = engine_folders(bundle, settings)

        try:
            if folders:
                import_tensorrt()  # only to see whether this is possible
        except RuntimeUnavailableError as error:
            log.warning("%s: its TensorRT engines are not used: %s", bundle.name, error)
            return None
        return f"engines in {' and '.join(map(str, folders))}" if folders else None


def engine_folders(bundle: Bundle, settings: Settings) -> list[Path]:
    """List the folders that contain engines of *bundle*: the cache, and the folder beside the bundle."""
    folders = dict.fromkeys((cache_folder(bundle, settings.engine_cache), cache_folder(bundle)))
    return [folder for folder in folders if read_records(folder)]
