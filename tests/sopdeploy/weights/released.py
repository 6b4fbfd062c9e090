"""Weight files of released networks, and the logits that the released code computes from them.

`released.json` has, for each network, the names and shapes of the tensors in its file and
logits in float64. They were written by networks after the code of fast-MPN-COV, GSoP,
pytorch_resnet_cifar10 and GM-SOP (MatConvNet, with MATLAB's axes), with short stages and narrow
layers where the definition leaves room. `norms` have the tensors of a batch norm. Weights and
images depend on their names and shapes only.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
import torch
from torch import Tensor, nn

from sopdeploy.models.base import Classifier
from sopdeploy.weights.checkpoint import build_classifier, read_checkpoint
from sopdeploy.weights.files import check_is_weights
from sopdeploy.weights.import_weights import ImportReport, import_weights
from tests.sweep.goldens import numbers

RELEASED: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_suffix(".json").read_text("utf-8")
)
SHORT = (2, 1, 1, 1)  # blocks per stage; their weights have every kind of name
VGG_WIDTHS, VGG_HIDDEN = (8, 8, 16, 16, 16), 32  # with B-CNN, the last stage has 512 channels
COUNTER = "num_batches_tracked"
AVERAGE, SIDE = (121.5, 117.25, 103.75), 16  # of MatConvNet's images
Array = np.ndarray[Any, np.dtype[Any]]


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Draw the float32 weights *name* of a PyTorch network; variances and factors of norms are positive."""
    values = numbers(name, shape)
    if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
        return (1 + values.tanh() / 2).float()
    scale = (2 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.2
    return (values * scale).float()


def state_of(name: str) -> dict[str, Tensor]:
    """Return the state dict of the network *name*."""
    network = RELEASED[name]
    shapes = {key: tuple(shape) for key, shape in network["tensors"].items()}
    for norm, width in network["norms"].items():
        shapes |= {
            f"{norm}.{leaf}": (width,)
            for leaf in ("weight", "bias", "running_mean", "running_var")
        }
    counters = {f"{norm}.{COUNTER}": torch.tensor(0) for norm in network["norms"]}
    return {key: weight(key, shape) for key, shape in shapes.items()} | counters


def prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in state.items()}


def settled(network: nn.Module) -> nn.Module:
    """Give *network* weights and statistics that all matter; eval mode."""
    state = network.state_dict()
    network.load_state_dict(
        {name: weight(name, tuple(tensor.shape)).to(tensor) for name, tensor in state.items()}
    )
    return network.eval()


def imported(source: Path, name: str, **options: Any) -> tuple[Classifier, ImportReport]:
    """Import *source* as *name*."""
    out = source.with_name("imported.pt")
    report = import_weights(check_is_weights(source), name, out, **options)
    return build_classifier(read_checkpoint(out), out), report


def images_of(side: int) -> Tensor:
    """Make two images of different contrast, so that their covariances differ, too."""
    return numbers("images", (2, 3, side, side)) * torch.tensor([0.5, 2.0])[:, None, None, None]


@torch.no_grad()
def assert_logits(ours: nn.Module, expected: Tensor, images: Tensor) -> None:
    """Compare the logits with the *expected* ones in float64, and less strictly in float32."""
    torch.testing.assert_close(ours.double()(images), expected, rtol=1e-7, atol=1e-7)
    found = ours.float()(images.float())
    torch.testing.assert_close(
        found, expected.float(), rtol=1e-3, atol=1e-4 * float(expected.abs().max())
    )


def assert_released_logits(ours: nn.Module, name: str) -> None:
    """Compare the logits of *ours* with those of the released network *name*."""
    expected = torch.tensor(RELEASED[name]["logits"], dtype=torch.float64)
    assert_logits(ours, expected, images_of(RELEASED[name]["side"]))


@dataclass
class Net:
    """A MatConvNet network: parameters by name, layers as (name, type, block)."""

    params: dict[str, Array]
    layers: list[tuple[str, str, dict[str, Any]]]

    def norm(self, name: str, width: int) -> None:
        """Add the parameters of the batch norm *name*: factor, offset, and mean beside deviation."""
        for leaf, shape in (("w", (width, 1)), ("b", (width, 1)), ("m", (width, 2))):
            self.params[f"{name}_{leaf}"] = mat_weight(f"{name}_{leaf}", shape)


def mat_weight(name: str, shape: tuple[int, ...]) -> Array:
    """Draw the parameter *name* of a MatConvNet network, with values of float32; deviations are positive."""
    values = numbers(name, shape).numpy()
    if name.endswith("_bn_w"):
        values = 1 + np.tanh(values) / 2
    elif name.endswith("_bn_m"):
        values = np.stack([np.tanh(values[:, 0]) / 2, 1.1 + np.tanh(values[:, 1]) / 3], 1)
    elif name.endswith("_b"):
        values = values / 5
    elif name.endswith("_f"):
        values = values * (2 / np.prod(shape[:3])) ** 0.5 / (60 if name == "conv1_f" else 1)
    return values.astype("f4").astype("f8")


def matconvnet(name: str) -> Net:
    """Return the MatConvNet network *name*."""
    stored = RELEASED[name]
    layers = [
        (
            layer,
            f"dagnn.{kind}",
            {key: np.array(v) if key == "stride" else v for key, v in block.items()},
        )
        for layer, kind, block in stored["layers"]
    ]
    net = Net(
        {key: mat_weight(key, tuple(shape)) for key, shape in stored["tensors"].items()}, layers
    )
    for norm, width in stored["norms"].items():
        net.norm(norm, width)
    return net


def pixels() -> Tensor:
    """Make two images of 0 to 255 minus the mean, float64."""
    return (60 * numbers("pixels", (2, 3, SIDE, SIDE))).round().clip(-100, 130)


def tree(net: Net, dtype: str) -> dict[str, Any]:
    """Build the variables that MATLAB saves: structs are dicts, struct arrays lists, cells tuples."""
    params = []
    for name, value in net.params.items():
        array = value.astype(dtype)
        while array.ndim > 2 and array.shape[-1] == 1:  # MATLAB drops trailing axes of one
            array = array[..., 0]
        params.append({"name": name, "value": array, "learningRate": 1.0, "weightDecay": 1.0})

    layers = [
        {"name": name, "type": kind, "inputs": ("x",), "params": (), "block": block}
        for name, kind, block in net.layers
    ]
    normalization = {
        "averageImage": np.array(AVERAGE)[:, None],
        "imageSize": np.array([[SIDE, SIDE, 3.0]]),
    }
    meta = {
        "normalization": normalization,
        "inputSize": ("input", np.array([[64.0, 64, 3, 32]])),
    }
    return {
        "net": {
            "vars": [{"name": "input"}, {"name": "x"}],
            "params": params,
            "layers": layers,
            "meta": meta,
        }
    }


def save_v7(path: Path, net: Net, dtype: str = "f8", *, compressed: bool = False) -> Path:
    scipy.io.savemat(path, as_scipy(tree(net, dtype)), do_compression=compressed)
    return path


def as_scipy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: as_scipy(item) for key, item in value.items()}
    if not isinstance(value, list | tuple):
        return value
    records = isinstance(value, list) and value and isinstance(value[0], dict)
    cells = np.empty(
        (1, len(value)), dtype=[(key, object) for key in value[0]] if records else object
    )
    for index, item in enumerate(value):
        cells[0, index] = tuple(map(as_scipy, item.values())) if records else as_scipy(item)
    return cells
