"""Programs whose operators are compared with their ONNX forms: functions of images, and networks.

Each function takes (B, 3, 16, 16) and returns any shape with B rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.operators.compare import Minimal
from tests.sweep.smallest import LOWERED, WALKED

Function = Callable[[Tensor], Tensor]


def attend_masked(images: Tensor, added: Tensor) -> Tensor:
    """Attention between rows, with -inf added where an image is positive."""
    added = added.masked_fill(images > 0, -torch.inf)
    return F.scaled_dot_product_attention(images, images, images, added).mean((2, 3))


def softmax_by_hand(x: Tensor) -> Tensor:
    powers = (x - x.amax(1, keepdim=True)).exp()
    return powers / powers.sum(1, keepdim=True)


TABLE = nn.Parameter(torch.arange(18.0).reshape(9, 2))  # has no row 100
EQUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "logsigmoid": F.logsigmoid,
    "atan2": lambda x: torch.atan2(x, x + 1) + torch.atan2(x / x.sum(), x),
    "log1p": torch.log1p,
    "expm1": torch.expm1,
    "sign": torch.sign,
    "largest": lambda x: x.amax(1),
    "a table": lambda x: F.embedding(x.long().abs(), TABLE).mean(-1),
    "maximum after a norm": lambda x: F.normalize(x).amax(1),
    "maximum after a local response norm": lambda x: F.max_pool2d(
        F.local_response_norm(x, 3), 2
    ),
    "softmax by hand": lambda x: softmax_by_hand(x).amax(1),
    "roots": lambda x: x.abs().pow(0.5),
    "no value that may be read": lambda x: attend_masked(x, x.new_zeros(x.shape)),
    "infinities": lambda x: x.masked_fill(x > 0, -torch.inf).softmax(-1).nan_to_num(),
    "largest values": lambda x: x.flatten(1).topk(5)[0],
    "stable sort": lambda x: x.flatten(1).sort(dim=1, stable=True)[1].float(),
    "stable argsort": lambda x: (
        x.flatten(1).argsort(dim=1, stable=True, descending=True).float()
    ),
    "activations": lambda x: (
        F.elu(x) + F.gelu(x) + F.mish(x) + F.hardswish(x) + F.silu(x) + F.softplus(x)
    ),
    "pooling": lambda x: F.max_pool2d(F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), 3, 2, 1),
    "pooling of a padding": lambda x: F.max_pool2d(
        F.pad(x, (0, 1, 0, 1), value=-torch.inf), 3, 2
    ),
    "norms": lambda x: F.layer_norm(F.group_norm(F.normalize(x), 3), (16,)),
}


class Recurrent(nn.Module):
    """The results of a recurrent *layer* of torch for each of the tokens of `tokens`."""

    def __init__(self, layer: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        self.layer = layer(48, 8, batch_first=True, **options)

    def forward(self, images: Tensor) -> Tensor:
        results: Tensor = self.layer(tokens(images))[0]
        return results


class Layers(nn.Module):
    """The sum of several *layers* and *functions* of one image, each as one number."""

    def __init__(
        self, functions: tuple[Function, ...], layers: tuple[nn.Module, ...] = ()
    ) -> None:
        super().__init__()
        self.functions = functions
        self.layers = nn.ModuleList(layers)

    def forward(self, images: Tensor) -> Tensor:
        results = [compute(images) for compute in (*self.functions, *self.layers)]
        means = [result.flatten(1).float().mean(1, keepdim=True) for result in results]
        return torch.cat(means, 1)


def tokens(x: Tensor) -> Tensor:
    """Return (B, 16, 48): a token for each patch of 4 x 4 pixels."""
    return F.pixel_unshuffle(x, 4).flatten(2).transpose(1, 2)


def heads(x: Tensor) -> Tensor:
    """Return (B, 4, 16, 12): the tokens of four heads."""
    return tokens(x).reshape(x.shape[0], 16, 4, 12).permute(0, 2, 1, 3)


def windows(x: Tensor) -> Tensor:
    """Return (16 B, 48): windows of 4 x 4 pixels as rows, as Swin has them."""
    b, c, h, w = x.shape
    rows = x.view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1)
    return rows.reshape(-1, 48).reshape(b, -1)


def sum_rows(x: Tensor, **options: Any) -> Tensor:
    """Add all values of an image into the first place of a row."""
    rows = x.flatten(1)
    return rows.scatter_reduce(1, torch.zeros_like(rows, dtype=torch.long), rows, **options)


def overwrite(x: Tensor, channel: Tensor | float) -> Tensor:
    """Return a copy of *x* whose first channel is *channel*."""
    copied = x.clone()
    copied[:, 0] = channel
    return copied


WEIGHT = torch.linspace(-1, 1, 48)
ACTIVATIONS: tuple[Function, ...] = (
    F.relu,
    F.relu6,
    F.sigmoid,
    F.tanh,
    F.gelu,
    F.silu,
    F.mish,
    F.elu,
    F.celu,
    F.selu,
    F.softplus,
    F.softsign,
    F.hardtanh,
    F.hardsigmoid,
    F.hardswish,
    F.leaky_relu,
    F.logsigmoid,
    F.tanhshrink,
    partial(F.gelu, approximate="tanh"),
    partial(F.leaky_relu, negative_slope=0.2),
    partial(F.elu, alpha=0.5),
    partial(F.glu, dim=3),
    lambda x: F.prelu(x, WEIGHT[:3]),
    lambda x: F.threshold(x, 0.5, 0.0),
    lambda x: F.relu(x.clone(), inplace=True),
    lambda x: F.softmax(x, 1),
    lambda x: x.softmax(-1),
    lambda x: F.log_softmax(x, 1),
    lambda x: F.silu(x) * x,
    lambda x: F.hardtanh(x, 0.0, 6.0),
    lambda x: x * torch.sigmoid(1.702 * x),
    lambda x: F.dropout(x, training=False),
)
ARITHMETIC: tuple[Function, ...] = (
    torch.exp,
    torch.sqrt,
    torch.abs,
    torch.neg,
    torch.floor,
    torch.ceil,
    torch.round,
    torch.trunc,
    torch.sin,
    torch.cos,
    torch.square,
    torch.erf,
    torch.atan,
    torch.sign,
    torch.logical_not,
    torch.isnan,
    lambda x: x.abs().log(),
    lambda x: (x.abs() + 1).rsqrt(),
    lambda x: (x * x + 1).reciprocal(),
    lambda x: x**2,
    lambda x: x**3,
    lambda x: x.abs() ** 0.5,
    lambda x: (x.abs() + 1) ** x,
    lambda x: 2.0**x,
    lambda x: x + 1,
    lambda x: 1 + x,
    lambda x: x - 1,
    lambda x: 1 - x,
    lambda x: x - x.mean(),
    lambda x: 2 * x,
    lambda x: x / 2,
    lambda x: 1 / (x.abs() + 1),
    lambda x: x / (x.abs() + 1),
    lambda x: x.abs() // 2,
    lambda x: x.clamp(0, 1),
    lambda x: x.clamp(min=0),
    lambda x: x.clamp(max=1),
    lambda x: x.clamp_min(0.1),
    lambda x: x.clamp(1e-6),
    lambda x: x.clamp(0.1, 0.9),
    lambda x: x.clamp(max=0.9),
    lambda x: x.clamp_max(0.9),
    lambda x: x > 0.5,
    lambda x: x >= 0.5,
    lambda x: x < 0.5,
    lambda x: x <= 0.5,
    lambda x: x == 0.5,
    lambda x: x != 0.5,
    lambda x: x / 2.5,
    lambda x: 0.5 * x,
    lambda x: x + 0.5,
    lambda x: 0.5 - x,
    lambda x: x % 2,
    lambda x: torch.fmod(x, 2),
    lambda x: F.normalize(x, p=1, dim=1),
    lambda x: x.norm(p=1, dim=1),
    lambda x: F.softshrink(x),
    lambda x: torch.var_mean(x, dim=1)[1],
    lambda x: F.one_hot(x.argmax(1), 3).float(),
    lambda x: x.unfold(2, 4, 2),
    lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
    lambda x: torch.tril(x),
    lambda x: torch.addmm(torch.ones(3), x.mean((2, 3)), torch.eye(3)),
    lambda x: x.repeat_interleave(2, dim=1),
    lambda x: torch.addcmul(x, x, x, value=0.5),
    lambda x: torch.addcdiv(x, x, x.abs() + 1),
    lambda x: torch.logit(x.sigmoid(), eps=1e-6),
    lambda x: torch.tensordot(x, torch.ones(16, 2), 1),
    lambda x: x.bool().float(),
    lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    lambda x: torch.cdist(x.mean((2, 3)), torch.eye(3)),
    lambda x: torch.maximum(x, -x),
    lambda x: torch.minimum(x, -x),
    lambda x: torch.where(x > 0, x, -x),
    lambda x: torch.where(x > 0, x, 0.0),
    lambda x: torch.where(x > 0, 1.0, x),
    lambda x: x.masked_fill(x > 1, 0.0),
    lambda x: x > 0,
    lambda x: x >= 0,
    lambda x: x < 0,
    lambda x: x <= 0,
    lambda x: x == 0,
    lambda x: x != 0,
    lambda x: x > x.mean(),
    lambda x: (x > 0) & (x < 1),
    lambda x: (x > 0) | (x < -1),
    lambda x: ~(x > 0),
    lambda x: (x > 0).float(),
    lambda x: (x > 0).to(x.dtype),
    lambda x: x.half().float(),
    lambda x: x.double().float(),
    lambda x: x.long(),
    lambda x: (x > 0).int(),
    lambda x: torch.lerp(x, -x, 0.3),
    lambda x: torch.addcmul(x, x, x),
    lambda x: x.type_as(x),
    lambda x: x.mul(x).add_(x),
    lambda x: x.sign() * x.abs().sqrt(),
    lambda x: x.sub(x, alpha=0.5),
    lambda x: x.clone().mul_(2).add_(1),
)
REDUCTIONS: tuple[Function, ...] = (
    lambda x: x.mean((2, 3)),
    lambda x: x.mean(1),
    lambda x: x.mean(1, keepdim=True),
    lambda x: x.mean((2, 3), keepdim=True),
    lambda x: x.sum(1),
    lambda x: x.sum((2, 3)),
    lambda x: x.sum(1, keepdim=True),
    lambda x: x.sum((2, 3), keepdim=True),
    lambda x: x.amax(1),
    lambda x: x.amax((2, 3)),
    lambda x: x.amax(1, keepdim=True),
    lambda x: x.amin(1),
    lambda x: x.amax((2, 3), keepdim=True),
    lambda x: x.amin((2, 3), keepdim=True),
    lambda x: x.max(1)[0],
    lambda x: x.max(1, keepdim=True)[0],
    lambda x: x.max(1)[1],
    lambda x: x.min(1)[1],
    lambda x: torch.cat([*x.max(1)], 1),
    lambda x: torch.cat([*x.min(1)], 1),
    lambda x: x.argmax(1),
    lambda x: x.argmax(1, keepdim=True),
    lambda x: x.flatten(1).argmax(-1, keepdim=True),
    lambda x: x.argmin(1),
    lambda x: x.min(1)[0],
    lambda x: x.std((2, 3)),
    lambda x: x.var(1),
    lambda x: x.var((2, 3), keepdim=True),
    lambda x: x.var(1, unbiased=False, keepdim=True),
    lambda x: torch.var_mean(x, 1, keepdim=True)[0],
    lambda x: x.norm(dim=1),
    lambda x: x.norm(dim=1, keepdim=True),
    lambda x: F.normalize(x),
    lambda x: F.normalize(x, dim=-1),
    lambda x: x.logsumexp(1),
    lambda x: x.cumsum(-1),
    lambda x: x.prod(1),
    lambda x: (x > 0).any(1),
    lambda x: (x > 0).all(1),
    lambda x: (x > 0).sum(1),
    lambda x: x.flatten(1).topk(3)[0],
    lambda x: x.topk(2, 1)[0],
    lambda x: x.topk(2, largest=False)[0],
    lambda x: x.sort(dim=-1)[0],
    lambda x: x.sort(dim=1)[0],
    lambda x: x.sort(descending=True)[0],
    lambda x: x.sort(dim=1, descending=True)[0],
    lambda x: x.flatten(1).mean(-1, keepdim=True),
    lambda x: torch.linalg.vector_norm(x, dim=1),
    lambda x: F.cosine_similarity(x, x + 1),
)
SHAPES: tuple[Function, ...] = (
    tokens,
    heads,
    windows,
    lambda x: x.view(x.shape[0], -1),
    lambda x: x.reshape(x.shape[0], 3, -1),
    lambda x: x.flatten(2),
    lambda x: x.permute(0, 2, 3, 1),
    lambda x: x.transpose(1, 2).contiguous(),
    lambda x: x[:, :2],
    lambda x: x[:, 1],
    lambda x: x[..., ::2],
    lambda x: x[:, :, 1:-1, 1:-1],
    lambda x: x[:, None],
    lambda x: x[:, [2, 1, 0]],
    lambda x: x[:, -1],
    lambda x: torch.cat([x, x], 1),
    lambda x: torch.stack([x, x], 1),
    lambda x: x.chunk(3, 1)[1],
    lambda x: x.split([1, 2], 1)[1],
    lambda x: x.split(1, 1)[0],
    lambda x: x.unbind(1)[0],
    lambda x: x.repeat(1, 2, 1, 1),
    lambda x: x + WEIGHT[:16].repeat(x.shape[0], 1, 1, 1),
    lambda x: overwrite(x, 0.0),
    lambda x: overwrite(x, x[:, 1]),
    lambda x: x.select_scatter(x[:, 0], 1, 2),
    lambda x: x.slice_scatter(x[:, :1], 1, 1, 2),
    lambda x: x + WEIGHT[:16].slice_scatter(WEIGHT[:8], 0, 4, 12),
    lambda x: x.clone().fill_(2.0) + x,
    lambda x: sum_rows(x, reduce="sum"),
    lambda x: sum_rows(x, reduce="amax"),
    lambda x: x.mean((2, 3))[..., None, None].expand(-1, -1, 4, 4),
    lambda x: x.roll(2, 2),
    lambda x: x.roll((1, 2), (2, 3)),
    lambda x: x.flip(3),
    lambda x: x.rot90(1, (2, 3)),
    lambda x: x.unflatten(1, (1, 3)),
    lambda x: x.squeeze(0) if x.dim() > 4 else x,
    lambda x: x[:, :1].squeeze(1),
    lambda x: x.unsqueeze(1),
    lambda x: x.movedim(1, -1),
    lambda x: x.expand_as(x),
    lambda x: F.pad(x, (1, 1, 1, 1)),
    lambda x: F.pad(x, (1, 2), value=1.0),
    lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    lambda x: F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2),
    lambda x: F.pixel_unshuffle(x, 2),
    lambda x: F.channel_shuffle(x.repeat(1, 2, 1, 1), 2),
    lambda x: F.unfold(x, 4, stride=4),
    lambda x: x.triu(),
    lambda x: x.tril(1),
    lambda x: x * torch.arange(16.0),
    lambda x: x * torch.arange(1.0, 17.0),
    lambda x: x * torch.arange(0, 32, 2),
    lambda x: x + torch.ones_like(x),
    lambda x: x + torch.zeros(1),
    lambda x: x + x.new_ones(1),
    lambda x: torch.full_like(x, 2) * x,
    lambda x: x + torch.linspace(0, 1, 16),
    lambda x: x.index_select(1, torch.tensor([0, 2])),
    lambda x: x.gather(1, torch.zeros(x.shape[0], 1, 16, 16, dtype=torch.long)),
    lambda x: F.embedding((x > 0).long(), TABLE),
    lambda x: F.one_hot((x > 0).long(), 3),
    lambda x: torch.cat([x.new_zeros(x.shape[0], 1, 16, 16), x], 1),
    lambda x: torch.cat([WEIGHT.expand(x.shape[0], 1, -1), tokens(x)], 1),
    lambda x: x.detach(),
    lambda x: x.tile(1, 1, 2, 2),
    lambda x: torch.meshgrid(x[0, 0, 0], x[0, 0, 1], indexing="ij")[0].expand(
        x.shape[0], 16, 16
    ),
    lambda x: x.diagonal(0, 2, 3),
)
POOLINGS: tuple[Function, ...] = (
    lambda x: F.max_pool2d(x, 2),
    lambda x: F.max_pool2d(x, 3, 2, 1),
    lambda x: F.max_pool2d(x, 3, 2, 0, ceil_mode=True),
    lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
    lambda x: F.max_pool2d(x, 3, 1, 1),
    lambda x: F.max_pool2d(x, 2, 2),
    lambda x: F.avg_pool2d(x, 2),
    lambda x: F.avg_pool2d(x, 3, 2, 1),
    lambda x: F.avg_pool2d(x, 2, 2),
    lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    lambda x: F.avg_pool2d(x, 2, 2, 0, ceil_mode=True),
    lambda x: F.avg_pool2d(x, 2, 2, 0, True, False),
    lambda x: F.adaptive_avg_pool2d(x, 1),
    lambda x: F.adaptive_avg_pool2d(x, 4),
    lambda x: F.adaptive_max_pool2d(x, 1),
    lambda x: F.adaptive_avg_pool2d(x, (1, None)),
    lambda x: F.adaptive_avg_pool1d(tokens(x), 1),
    lambda x: F.interpolate(x, scale_factor=2),
    lambda x: F.interpolate(x, size=8, mode="bilinear"),
    lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
    lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    lambda x: F.interpolate(x, size=8, mode="bilinear", align_corners=True),
    lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    lambda x: F.interpolate(x, size=8, mode="bicubic", align_corners=True),
    lambda x: F.interpolate(x, size=(7, 9)),
    lambda x: F.interpolate(x, size=8, mode="bicubic"),
    lambda x: F.interpolate(x, size=8, mode="bilinear", antialias=True),
    lambda x: F.avg_pool1d(tokens(x), 4),
    lambda x: F.max_pool1d(tokens(x), 4),
    lambda x: F.lp_pool2d(x.abs() + 1, 2, 2),
    lambda x: F.local_response_norm(x, 3),
)
PRODUCTS: tuple[Function, ...] = (
    lambda x: x @ x.transpose(2, 3),
    lambda x: tokens(x) @ tokens(x).transpose(1, 2),
    lambda x: torch.bmm(tokens(x), tokens(x).mT),
    lambda x: F.linear(tokens(x), torch.eye(48)),
    lambda x: F.linear(tokens(x), torch.eye(48), WEIGHT),
    lambda x: torch.einsum("bchw,bdhw->bcd", x, x),
    lambda x: torch.einsum("bij,bkj->bik", tokens(x), tokens(x)),
    lambda x: torch.einsum("bhij,bhjd->bhid", x, x),
    lambda x: torch.einsum("bhid,bhjd->bhij", x, x),
    lambda x: torch.einsum("bnc,cd->bnd", tokens(x), torch.eye(48)),
    lambda x: torch.einsum("bchw,bc->bhw", x, x.mean((2, 3))),
    lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x)),
    lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x), scale=0.3),
    lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x), is_causal=True),
    lambda x: F.scaled_dot_product_attention(
        heads(x), heads(x), heads(x), WEIGHT[:16].expand(16, 16)
    ),
    lambda x: F.scaled_dot_product_attention(
        heads(x), heads(x), heads(x), (WEIGHT > 0)[:16].expand(16, 16)
    ),
    lambda x: (heads(x) @ heads(x).mT * 0.3).softmax(-1) @ heads(x),
    lambda x: torch.outer(x[0, 0, 0], x[0, 0, 1]).expand(x.shape[0], 16, 16),
    lambda x: torch.baddbmm(tokens(x), tokens(x), torch.eye(48).expand(x.shape[0], 48, 48)),
    lambda x: F.conv2d(x, torch.ones(3, 1, 3, 3), groups=3, padding=1),
    lambda x: F.conv2d(x, torch.ones(2, 3, 3, 3), padding="same"),
    lambda x: F.grid_sample(
        x, torch.zeros(1, 4, 4, 2).expand(x.shape[0], 4, 4, 2), align_corners=False
    ),
)
LAYERS: tuple[Callable[[], nn.Module], ...] = (
    lambda: nn.Conv2d(3, 4, 3),
    lambda: nn.Conv2d(3, 4, 3, 2, 1),
    lambda: nn.Conv2d(3, 6, 3, 1, 1, groups=3, bias=False),
    lambda: nn.Conv2d(3, 4, 1),
    lambda: nn.Conv2d(3, 4, 1, bias=False),
    lambda: nn.Conv2d(3, 4, 3, padding=2, dilation=2),
    lambda: nn.Conv2d(3, 4, 3, padding="same"),
    lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    lambda: nn.ConvTranspose2d(3, 4, 2, 2),
    lambda: nn.ConvTranspose2d(3, 4, 3, 2, 1, 1, bias=False),
    lambda: nn.BatchNorm2d(3),
    lambda: nn.GroupNorm(3, 3),
    lambda: nn.GroupNorm(1, 3),
    lambda: nn.InstanceNorm2d(3),
    lambda: nn.InstanceNorm2d(3, affine=True),
    lambda: nn.LayerNorm(16),
    lambda: nn.LayerNorm((3, 16, 16)),
    lambda: nn.LayerNorm(16, elementwise_affine=False),
    lambda: nn.LayerNorm(16, bias=False),
    lambda: nn.RMSNorm(16),
    lambda: nn.PReLU(),
    lambda: nn.Upsample(scale_factor=2),
    lambda: nn.UpsamplingBilinear2d(scale_factor=2),
    lambda: nn.AdaptiveAvgPool2d(1),
    lambda: nn.AdaptiveAvgPool2d((6, 6)),
    lambda: nn.ZeroPad2d(1),
    lambda: nn.ReflectionPad2d(1),
    lambda: nn.Flatten(),
    lambda: nn.Linear(16, 4),
    lambda: nn.Linear(16, 4, bias=False),
    lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 3)),
    lambda: nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(3)),
    lambda: Recurrent(nn.LSTM),
    lambda: Recurrent(nn.LSTM, bidirectional=True),
    lambda: Recurrent(nn.GRU),
    lambda: Recurrent(nn.GRU, bidirectional=True),
    lambda: Recurrent(nn.RNN),
    lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 2, 3, padding=1)),
)
# With arguments that the networks above leave out or give.
DEFAULTS: tuple[Function, ...] = (
    lambda x: torch.stack([x, 2 * x]).unbind()[0],
    lambda x: torch.cat([x.transpose(0, 1), x.transpose(0, 1)]).transpose(0, 1),
    lambda x: F.conv2d(x, torch.ones(2, 3, 3, 3), torch.ones(2), 2),
    lambda x: WEIGHT[(x > 0).long()],
    lambda x: torch.ops.aten.alias(x),
    lambda x: (x > 0).cumsum(-1, dtype=torch.float32),
)
GROUPS: dict[str, Callable[[], nn.Module]] = {
    "activations": lambda: Layers(ACTIVATIONS),
    "arithmetic": lambda: Layers(ARITHMETIC),
    "reductions": lambda: Layers(REDUCTIONS),
    "shapes": lambda: Layers(SHAPES),
    "poolings": lambda: Layers(POOLINGS),
    "products": lambda: Layers(PRODUCTS),
    "layers": lambda: Layers((), tuple(build() for build in LAYERS)),
    "defaults": lambda: Layers(DEFAULTS),
}
# By name: a network, and the side of its images.
Program = tuple[Callable[[], nn.Module], int]
FUNCTIONS: dict[str, Program] = {
    **{f"a group of {name}": (build, 16) for name, build in GROUPS.items()},
    **{
        name: (lambda function=function: nn.Sequential(Minimal(function), nn.Flatten()), 16)  # type: ignore[misc]
        for name, function in EQUAL.items()
    },
}
OWN: dict[str, Program] = {
    f"{small.name} {dict(small.config)}": (small.build, small.side)
    for small in (*WALKED, *LOWERED)
}
# Of timm: the arguments of each network, with few blocks, and the side of its images.
OF_TIMM: dict[str, tuple[dict[str, Any], int]] = {
    "vit_tiny_patch16_224": ({"depth": 1, "img_size": 32}, 32),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 64, "window_size": 4, "depths": (1, 1, 1, 2)},
        64,
    ),
    "convnext_atto": ({"depths": (1, 1, 1, 1)}, 64),
    "mobilenetv3_small_050": ({}, 64),
    "efficientvit_b0": ({}, 64),
    "mobilevit_xxs": ({}, 64),
    "levit_128s": ({}, 224),
    "eva02_tiny_patch14_224": ({"depth": 1, "img_size": 28}, 28),
}


def build_of_timm(name: str) -> nn.Module:
    """Build the network *name* of timm, with the arguments of `OF_TIMM`."""
    network: nn.Module = timm.create_model(name, num_classes=3, **OF_TIMM[name][0])
    return network
