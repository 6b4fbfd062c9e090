"""Reference implementation of GM-SOP's networks in MatConvNet's layout: MATLAB's axes, columns first.

Images are height x width x channels x images, of 0..255 less the mean; a vector of a matrix goes
down its columns, (0,0), (0,1), (1,1), (0,2) ..; batch norm divides by the stored deviation.
"""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.io
import torch
from numpy.lib.stride_tricks import sliding_window_view

from tests.sopdeploy.importers.released_torch import covariance, root, triangle

NUMBERS = itertools.count()
AVERAGE = (121.5, 117.25, 103.75)
EPS = 1e-5
SIDE, COMPONENTS, CHOSEN = 16, 16, 8
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Net:
    """Parameters by name, layers as (name, type, block), and the steps of Newton-Schulz."""

    draw: np.random.Generator
    params: dict[str, Array] = field(default_factory=dict)
    layers: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    steps: int = 3

    def layer(self, name: str, kind: str, **block: Any) -> None:
        self.layers.append((name, f"dagnn.{kind}", block))

    def kernel(self, name: str, k: int, inside: int, outside: int, scale: float = 1.0) -> None:
        values = self.draw.normal(size=(k, k, inside, outside)) * np.sqrt(2.0 / (k * k * inside)) * scale
        self.params[f"{name}_f"] = values

    def norm(self, name: str, width: int) -> None:
        self.layer(f"{name}_bn", "BatchNorm", numChannels=float(width), epsilon=1e-4)
        self.params[f"{name}_bn_w"] = self.draw.uniform(0.5, 1.5, (width, 1))
        self.params[f"{name}_bn_b"] = self.draw.uniform(-0.5, 0.5, (width, 1))
        moments = [self.draw.uniform(-0.5, 0.5, width), np.sqrt(self.draw.uniform(0.5, 2.0, width) + EPS)]
        self.params[f"{name}_bn_m"] = np.stack(moments, axis=1)

    def conv(self, name: str, k: int, inside: int, outside: int, stride: int = 1) -> None:
        self.kernel(name, k, inside, outside, scale=1 / 60 if name == "conv1" else 1.0)
        size = np.array([[k, k, inside, outside]], float)
        self.layer(f"{name}_conv", "Conv", size=size, stride=np.array([[stride, stride]], float))
        self.norm(name, outside)

    def roots(self, prefix: str) -> None:
        self.layer(f"{prefix}cov_pool", "OBJ_ConvNet_COV_Pool")
        self.layer(f"{prefix}cov_trace_norm", "OBJ_ConvNet_Cov_TraceNorm", opts=["cuDNN"])
        steps = float(self.steps)
        self.layer(f"{prefix}Cov_Sqrtm", "OBJ_ConvNet_Cov_Sqrtm", coef=1.0, iterNum=steps, cudnn=["CuDNN"])
        self.layer(f"{prefix}Cov_ScaleTr", "OBJ_ConvNet_COV_ScaleTr")

    def mixture(self, inside: int, order: int) -> int:
        """Add gate and components; return the length of a component's vector."""
        at = inside
        for number, width in enumerate((10, 6) if order == 2 else (9, 7), 1):
            self.conv(f"gating{number}", 1, at, width)
            at = width
        if order == 2:
            self.roots("gating_")
        features = vector_length(at, order)
        self.params["gating_w"] = self.draw.normal(size=(features, COMPONENTS))
        self.params["gating_noise_w"] = self.draw.normal(size=(features, COMPONENTS))
        count = {"topk": float(CHOSEN), "CM_num": float(COMPONENTS)}
        self.layer("H_x", "H_x", **count, dim_in=float(features))
        self.layer("gating", "gating", **count, hasBias=np.array([[0]], np.uint8))
        self.layer("Balance_loss", "Balance_loss", loss_weight=100.0, CM_num=float(COMPONENTS))
        for component in range(1, COMPONENTS + 1):
            at = inside
            for letter, width in zip("ab", (12, 8) if order == 2 else (11,), strict=False):
                self.kernel(f"CM_{component}_{letter}", 1, at, width)
                at = width
            if order == 2:
                self.roots(f"CM_{component}_")
        length = vector_length(at, order)
        self.layer("Fusion_out", "CM_out", topk=float(CHOSEN), hdim=float(length))
        self.norm("fusion_bn", length)
        return length


def vector_length(channels: int, order: int) -> int:
    return channels * (channels + 1) // 2 if order == 2 else channels


def random_net(
    *, order: int, gated: bool, blocks: int = 2, widen: int = 1, wrn: bool = False, seed: int = 0
) -> Net:
    """Make one of the released networks with narrow gate and components, for five classes."""
    net = Net(np.random.default_rng(seed))
    net.conv("conv1", 3, 3, 16)
    net.params["conv1_b"] = net.draw.normal(size=(16, 1)) * 0.1
    inside = 16
    for stage in range(2, 6):
        width = 2 ** (stage + 2) * widen
        stride = 2 if stage in (3, 4) or (stage == 5 and order == 1) else 1
        for block in range(1, blocks + 1):
            name = f"conv{stage}_{block}"
            if block == 1 and (stage > 2 or wrn):
                net.conv(f"{name}_adapt_conv", 1, inside, width, stride)
            net.conv(f"{name}a", 3, inside, width, stride if block == 1 else 1)
            net.conv(f"{name}b", 3, width, width)
            inside = width
    length = vector_length(inside, order)
    if gated:
        length = net.mixture(inside, order)
        rate = 0.4 if wrn and order == 2 else 0.2
        net.layer("dropout", "DropOut", rate=rate, frozen=np.array([[0]], np.uint8))
    elif order == 2:
        net.roots("")
    net.kernel("prediction", 1, length, 5)
    net.params["prediction_b"] = net.draw.normal(size=(5, 1))
    net.layer("prediction", "Conv", hasBias=np.array([[1]], np.uint8))
    net.layer("loss", "Loss", loss="softmaxlog", opts=[])
    return net


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


class Run:
    """One pass in one precision; `logits` maps images to (classes, images)."""

    def __init__(self, net: Net, dtype: Any) -> None:
        self.net = net
        self.p = {name: value.astype(dtype) for name, value in net.params.items()}
        self.strides = {name: int(np.ravel(b["stride"])[0]) for name, _, b in net.layers if "stride" in b}
        self.second = any(kind.endswith("Cov_Sqrtm") for _, kind, _ in net.layers)

    def conv(self, name: str, x: Array) -> Array:
        f, stride = self.p[f"{name}_f"], self.strides.get(f"{name}_conv", 1)
        pad = (f.shape[0] - 1) // 2
        x = np.pad(x, ((pad, pad), (pad, pad), (0, 0), (0, 0)))
        windows = sliding_window_view(x, f.shape[:2], axis=(0, 1))[::stride, ::stride]
        return np.tensordot(windows, f, axes=([4, 5, 2], [0, 1, 2])).transpose(0, 1, 3, 2)

    def norm(self, name: str, x: Array) -> Array:
        mean, deviation = self.p[f"{name}_bn_m"][:, 0], self.p[f"{name}_bn_m"][:, 1]
        scaled = (x - mean[:, None]) / deviation[:, None]
        return scaled * self.p[f"{name}_bn_w"] + self.p[f"{name}_bn_b"]

    def conv_norm(self, name: str, x: Array) -> Array:
        x = self.conv(name, x)
        return self.norm(name, x) if f"{name}_bn_w" in self.p else x

    def pooled(self, x: Array) -> Array:
        if not self.second:
            return x.mean((0, 1))
        sigma = covariance(torch.from_numpy(x.transpose(3, 2, 0, 1)))
        return triangle(root(sigma, self.net.steps), "columns").numpy().T

    def logits(self, x: Array) -> Array:
        x = relu(self.norm("conv1", self.conv("conv1", x) + self.p["conv1_b"]))
        for name in (f"conv{stage}_{block}" for stage in range(2, 6) for block in range(1, 9)):
            if f"{name}a_f" in self.p:
                adapt = f"{name}_adapt_conv"
                short = self.conv_norm(adapt, x) if f"{adapt}_f" in self.p else x
                x = relu(short + self.conv_norm(f"{name}b", relu(self.conv_norm(f"{name}a", x))))
        vector = self.mixed(x) if "gating_w" in self.p else self.pooled(x)
        return self.p["prediction_f"][0, 0].T @ vector + self.p["prediction_b"]

    def mixed(self, x: Array) -> Array:
        g = relu(self.conv_norm("gating2", relu(self.conv_norm("gating1", x))))
        scores = self.p["gating_w"].T @ self.pooled(g)
        kept = scores >= np.sort(scores, axis=0)[-CHOSEN]
        powers = np.where(kept, np.exp(scores - scores.max(axis=0)), 0)
        weights = powers / powers.sum(axis=0)  # softmax of each column's largest scores, 0 elsewhere
        vector: Any = 0.0
        for component in range(COMPONENTS):
            c = x
            for name in (f"CM_{component + 1}_a", f"CM_{component + 1}_b"):
                if f"{name}_f" in self.p:
                    c = relu(self.conv_norm(name, c))
            vector = vector + weights[component] * self.pooled(c)
        return self.norm("fusion_bn", vector) if "fusion_bn_bn_w" in self.p else vector


def reference_logits(net: Net, images: torch.Tensor) -> torch.Tensor:
    """Compute logits (B, classes) of raw pixels less the mean (B, 3, H, W), in their precision."""
    x = images.numpy()
    return torch.from_numpy(np.ascontiguousarray(Run(net, x.dtype).logits(x.transpose(2, 3, 1, 0)).T))


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
    normalization = {"averageImage": np.array(AVERAGE)[:, None], "imageSize": np.array([[SIDE, SIDE, 3.0]])}
    meta = {"normalization": normalization, "inputSize": ("input", np.array([[64.0, 64, 3, 32]]))}
    return {
        "net": {"vars": [{"name": "input"}, {"name": "x"}], "params": params, "layers": layers, "meta": meta}
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
    cells = np.empty((1, len(value)), dtype=[(key, object) for key in value[0]] if records else object)
    for index, item in enumerate(value):
        cells[0, index] = tuple(map(as_scipy, item.values())) if records else as_scipy(item)
    return cells


def save_v73(path: Path, net: Net, dtype: str = "f8") -> Path:
    with h5py.File(path, "w", userblock_size=512) as file:
        refs = file.create_group("#refs#")
        for name, value in tree(net, dtype).items():
            write(refs, file, name, value)
    with path.open("r+b") as raw:
        raw.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")
    return path


def write(refs: Any, group: Any, name: str, value: Any) -> None:
    """Write *value* the way MATLAB does: axes reversed, text as uint16, arrays of structs as references."""
    if isinstance(value, dict):
        part, kind = group.create_group(name), "struct"
        for key, item in value.items():
            write(refs, part, key, item)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        part, kind = group.create_group(name), "struct"
        for key in value[0]:
            part.create_dataset(key, data=referred(refs, [item[key] for item in value]), dtype=h5py.ref_dtype)
    elif isinstance(value, list | tuple) and value:
        part, kind = group.create_dataset(name, data=referred(refs, value), dtype=h5py.ref_dtype), "cell"
    elif isinstance(value, list | tuple):
        part, kind = group.create_dataset(name, data=np.zeros(2, "u8")), "cell"
        part.attrs["MATLAB_empty"] = np.uint8(1)
    elif isinstance(value, str):
        codes = np.frombuffer(value.encode("utf-16-le"), "<u2")[:, None]
        part, kind = group.create_dataset(name, data=codes), "char"
    else:
        array = np.atleast_2d(np.asarray(value))
        kind = {"f8": "double", "f4": "single", "u1": "logical"}[array.dtype.str[1:]]
        part = group.create_dataset(name, data=array.T)
    part.attrs["MATLAB_class"] = np.bytes_(kind)


def referred(refs: Any, values: Any) -> Array:
    found = np.empty((len(values), 1), dtype=h5py.ref_dtype)
    for index, value in enumerate(values):
        name = f"r{next(NUMBERS)}"
        write(refs, refs, name, value)
        found[index, 0] = refs[name].ref
    return found
