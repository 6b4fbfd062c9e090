"""Where an attention module sits in a residual block: on the residual, or after the addition.

Papers: SE (Hu et al., CVPR 2018, Fig. 3), CBAM and Gather-Excite scale the residual before it is
added; GSoP's text (Gao et al., CVPR 2019, section 3.4) puts its block after the bottleneck and adds a
shortcut around it, GSoP's released code scales the residual. In both places the attention module is
called `attention`, and the keys of the block around it stay as they are.
"""

from torch import Tensor, nn

from sopdeploy.blocks.preactivation import PreActBottleneck
from sopdeploy.blocks.residual import BasicBlock, Bottleneck, ResidualBlock


class AttentionInside(ResidualBlock):
    """To be mixed in before a residual block: the attention scales the residual."""

    attention: nn.Module

    def residual(self, x: Tensor) -> Tensor:
        """Return the attended residual."""
        attended: Tensor = self.attention(super().residual(x))
        return attended


class AttentionAfter(ResidualBlock):
    """To be mixed in before a residual block: the block's output, plus the same attended."""

    attention: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Return out + attention(out)."""
        out = super().forward(x)
        attended: Tensor = self.attention(out)
        return out + attended


class BasicBlockAttendedInside(AttentionInside, BasicBlock):
    """Two 3x3 convolutions whose result is attended, then added to the shortcut."""


class BottleneckAttendedInside(AttentionInside, Bottleneck):
    """A bottleneck whose residual is attended, then added to the shortcut."""


class BottleneckAttendedAfter(AttentionAfter, Bottleneck):
    """A bottleneck, then an attention with a shortcut of its own."""


class PreActBottleneckAttendedInside(AttentionInside, PreActBottleneck):
    """A pre-activation bottleneck whose residual is attended, then added to the shortcut."""


class PreActBottleneckAttendedAfter(AttentionAfter, PreActBottleneck):
    """A pre-activation bottleneck, then an attention with a shortcut of its own."""
