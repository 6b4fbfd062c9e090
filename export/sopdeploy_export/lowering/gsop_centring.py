"""Rule: GSoP's covariances by mean or by sum, as the numbers of their centring constants say.

The channel block's constant I / M - 11^T / M^2 has M rows and removes the mean. The position block's
samples are the d channels: the paper's constant has d rows and removes the mean as well, the released
code's is I / P - 11^T / P^2, of d rows too, which removes it only where d = P. Then X^T X / P - s s^T /
P^2, with s the sum over channels, is the exact cheap form, and subtracting a mean would be another network.
"""

from sopdeploy.blocks.gsop_channel import ChannelAttention
from sopdeploy.blocks.gsop_position import PositionAttention
from sopdeploy_export.lowering.centring import NAME, Centring
from sopdeploy_export.lowering.work import Work


def apply(work: Work) -> None:
    """Check and write down the constant of every GSoP covariance."""
    for where, _ in work.parts(ChannelAttention):
        height, width = work.calls[f"{where}.reduction"].output.shape[2:]
        note(work, where, written_for(height * width, rows=height * width))
    for where, position in work.parts(PositionAttention):
        samples = work.calls[f"{where}.reduction"].output.shape[1]
        released = position.switches.covariance == "uncentred"
        note(work, where, written_for(position.switches.side**2 if released else samples, rows=samples))


def written_for(count: int, *, rows: int) -> Centring:
    """Return I / count - 11^T / count^2 of *rows* rows."""
    return Centring(1.0 / count, -1.0 / count**2, rows)


def note(work: Work, where: str, constant: Centring) -> None:
    """Write down which form the constant allows."""
    alpha, beta = constant.alpha, constant.beta
    total = alpha + constant.size * beta
    form = "the mean is subtracted" if constant.removes_the_mean else "not centring: alpha X^T X + beta s s^T"
    work.note(
        NAME,
        where,
        f"alpha = {alpha:.3g}, beta = {beta:.3g}, alpha + {constant.size} beta = {total:.1g}",
        f"{form}; {constant.size} additions for {constant.size**2} multiply-adds",
    )
