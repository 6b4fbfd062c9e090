"""Principal components of feature maps, computed batch by batch.

The projection to them is the 1x1 convolution in front of a covariance: of all projections to d channels, it
keeps most of the trace of the covariance. Letters: B images, C channels, H height, W width, d components.
"""

import torch
from torch import Tensor

from sopdeploy.errors import DataError


class PrincipalComponents:
    """Sums over the positions of feature maps with *channels* channels, in float64."""

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.count = 0
        self.sum_C = torch.zeros(channels, dtype=torch.float64)
        self.products_CC = torch.zeros(channels, channels, dtype=torch.float64)

    @torch.no_grad()
    def add(self, maps_BCHW: Tensor) -> None:
        """Add every position of *maps_BCHW*, of any floating-point type and device."""
        rows = maps_BCHW.detach().transpose(0, 1).flatten(start_dim=1).T.double().cpu()
        if self.count == 0:
            self.origin_C = rows.mean(dim=0)  # near the mean, so that the subtraction below loses no digits
        rows = rows - self.origin_C
        self.count += len(rows)
        self.sum_C += rows.sum(dim=0)
        self.products_CC += rows.T @ rows

    def components(self, width: int) -> Tensor:
        """Compute the first *width* components (d, C) float64, each of length 1, in descending order.

        The largest element of each component is positive, so that the result does not depend on the library.
        Raises `DataError` if the values of the maps are not finite.
        """
        mean_C = self.sum_C / self.count
        covariance_CC = self.products_CC / self.count - torch.outer(mean_C, mean_C)
        if not bool(torch.isfinite(covariance_CC).all()):
            raise DataError("principal components: the feature maps have values that are not finite")
        _, vectors_CC = torch.linalg.eigh(covariance_CC)
        components_dC = vectors_CC.flip(1)[:, :width].T
        largest = components_dC.abs().argmax(dim=1, keepdim=True)
        signed_dC: Tensor = components_dC * components_dC.gather(1, largest).sign()
        return signed_dC
