"""The buffers that the first run of a network makes."""

from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize, images_format
from sopdeploy_export.capture.deployed import compute_outputs
from sopdeploy_export.network import (
    attributes_restored,
    modules,
    tensors,
    unstored_buffers,
)


def create_buffers(network: nn.Module, preprocess: Preprocess) -> tuple[str, ...]:
    """Give *network* the buffers that its first run creates or replaces; return their names.

    These are buffers that the state dict does not store, such as a table of positions for the
    size of the images. Buffers that depend on the images are not among them.
    """
    pixels = _blank_images(network, preprocess)

    # Most networks create none. A run on images with values shows this. It comes first, because a
    # run on images without values can leave tensors without values in objects that are not
    # restored.
    before = unstored_buffers(network)
    if not _changed_buffers(network, pixels, before):
        return ()

    # In a run on images without values, a buffer has values only if it does not depend on them.
    without_values = FakeTensorMode(allow_non_fake_inputs=True).from_tensor(pixels)
    created = _changed_buffers(network, without_values, before)

    owners = dict(modules(network))
    for name, tensor in created.items():
        owner, _, key = name.rpartition(".")
        owners[owner].register_buffer(key, tensor, persistent=False)
    return tuple(created)


def _blank_images(network: nn.Module, preprocess: Preprocess) -> Tensor:
    """Make two normalized black images (2, 3, H, W) for *network*, on its device."""
    images = torch.zeros(2, preprocess.crop, preprocess.crop, 3, dtype=torch.uint8)
    device = next((tensor.device for tensor in tensors(network).values()), images.device)
    return Normalize(preprocess, images_format(network))(images).to(device)


def _changed_buffers(
    network: nn.Module, pixels: Tensor, before: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """Map the names of unstored buffers that a run on *pixels* creates or replaces to the new tensors.

    *before* are the unstored buffers of *network* now. Of a run that fails, the buffers count that it
    made before. Tensors without values are left out. *network* is unchanged afterwards.
    """
    with attributes_restored(network), torch.no_grad():
        with suppress(Exception):  # of the user's code; a later run gives the message
            compute_outputs(network, pixels)
        after = unstored_buffers(network)

    # Tensors without values are of a class of their own.
    return {
        name: tensor
        for name, tensor in after.items()
        if type(tensor) is Tensor and tensor is not before.get(name)
    }
