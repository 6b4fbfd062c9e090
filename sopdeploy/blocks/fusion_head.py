"""The classifier after a mixture: batch norm, dropout, one linear layer.

Paper: Wang et al., GM-SOP (NeurIPS 2018), section 2.3. In eval mode the batch norm is an affine map of
each number and folds into the linear layer: W' = W diag(s), b' = b + W t.
"""

from torch import Tensor, nn

from sopdeploy.errors import TrainingError


class FusionHead(nn.Module):
    """Pooled vectors (B, D) in, logits (B, classes) out; the baselines have no batch norm."""

    def __init__(self, length: int, num_classes: int, *, norm: bool, dropout: float) -> None:
        super().__init__()
        self.bn: nn.Module = nn.BatchNorm1d(length) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(length, num_classes)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        """Return the logits; raises `TrainingError` for a training batch of one image."""
        if self.training and isinstance(self.bn, nn.BatchNorm1d) and pooled_BD.shape[0] == 1:
            raise TrainingError(
                "a training batch of one image has no batch statistics for the fusion batch norm; "
                "leave out the last, incomplete batch or choose another batch size"
            )
        logits: Tensor = self.fc(self.dropout(self.bn(pooled_BD)))
        return logits
