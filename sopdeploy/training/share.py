"""Makes a network compute its share of a batch: batch norms, dropout and noise know of the other rows.

Only the network in memory changes: names, parameters and state dict are those of the catalog's network, so
that a checkpoint holds nothing of it and what is exported has ordinary batch norms.
"""

from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sopdeploy.blocks.global_batch_norm import FrozenBatchNorm, GlobalBatchNorm, Replacement
from sopdeploy.blocks.rows import Rows, RowsDropout
from sopdeploy.blocks.sparse_gate import GateNoise

BatchNormKind = Literal["local", "global", "frozen"]


def share_batches(model: nn.Module, batch_norm: BatchNormKind, world: int, rows: Rows) -> None:
    """Change *model* for one of *world* processes; *rows* says which the next forward is of.

    `batch_norm` "global" is an ordinary batch norm where there is one process. Raises `ConfigError` for a
    batch norm that has no such kind.
    """
    for parent in list(model.modules()):
        if isinstance(parent, GateNoise | RowsDropout):
            parent.rows = rows
        for name, child in list(parent.named_children()):
            if type(child) is nn.Dropout:
                setattr(parent, name, RowsDropout(child.p, rows).train(child.training))
            elif isinstance(child, _BatchNorm) and not isinstance(child, Replacement):
                setattr(parent, name, shared_norm(child, batch_norm, world))


def shared_norm(norm: _BatchNorm, kind: BatchNormKind, world: int) -> _BatchNorm:
    """Return what stands in for *norm*, with its parameters and buffers, or *norm* itself."""
    if kind == "frozen":
        return FrozenBatchNorm(norm)
    if kind == "global" and world > 1:
        return GlobalBatchNorm(norm)
    return norm
