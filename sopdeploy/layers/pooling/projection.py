"""Principal components of feature maps.

The projection to them is the 1x1 convolution in front of a covariance: of all projections to d channels, it
keeps most of the trace of the covariance. Letters: B images, C channels, H height, W width, d components.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sopdeploy.errors import DataError


@torch.no_grad()
def principal_components(batches: Sequence[Tensor], width: int) -> Tensor:
    """Compute the first *width* principal components (d, C) float64 of the positions of maps (B, C, H, W).

    *batches* are of any floating-point type and device. Components have length 1 and descending order. The
    largest element of each is positive, so that the result does not depend on the library. Raises
    `DataError` if the values of the maps are not finite.
    """

    def rows_of(maps_BCHW: Tensor) -> Tensor:
        return maps_BCHW.transpose(0, 1).flatten(start_dim=1).T.double().cpu()

    positions = sum(maps.numel() // maps.shape[1] for maps in batches)
    mean_C = torch.stack([rows_of(maps).sum(dim=0) for maps in batches]).sum(dim=0) / positions
    covariance_CC = torch.zeros(len(mean_C), len(mean_C), dtype=torch.float64, device="cpu")
    for maps in batches:
        centered = rows_of(maps) - mean_C
        covariance_CC += centered.T @ centered / positions
    if not bool(torch.isfinite(covariance_CC).all()):
        raise DataError("principal components: the feature maps have values that are not finite")
    _, vectors_CC = torch.linalg.eigh(covariance_CC)
    components_dC = vectors_CC.flip(1)[:, :width].T
    largest = components_dC.abs().argmax(dim=1, keepdim=True)
    signed_dC: Tensor = components_dC * components_dC.gather(1, largest).sign()
    return signed_dC
