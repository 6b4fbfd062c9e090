"""A network on the device of a run, with the layout of its images."""

from collections.abc import Collection

import torch

from sopdeploy.errors import ConfigError, describe_known, is_memory_exhausted
from sopdeploy.layers.normalize import IMAGES_FORMAT
from sopdeploy.models.base import Classifier
from sopdeploy.training.distributed import Strategy
from sopdeploy.training.settings.recipe import Recipe


def move_to_device(recipe: Recipe, model: Classifier, strategy: Strategy) -> Classifier:
    """Move *model* to the device, in eval mode, and note the layout of its images.

    Raises `ConfigError` if it cannot compute the images of *recipe*.
    """
    layout = torch.channels_last if recipe.channels_last else torch.preserve_format
    placed: Classifier = model.to(strategy.device, memory_format=layout)  # type: ignore[call-overload]
    sides = {recipe.preprocess.crop, recipe.training_crop}
    what = f"preprocess.crop: {recipe.model.name}"
    vars(placed)[IMAGES_FORMAT] = find_images_format(
        sides, placed, strategy.device, what, recipe.preprocess.channels
    )
    return placed


@torch.no_grad()
def find_images_format(
    sides: Collection[int],
    model: Classifier,
    device: torch.device,
    what: str,
    channels: int = 3,
) -> torch.memory_format:
    """Put *model* into eval mode and run it on zeros of all *sides*; return the layout of its images.

    The images have so many *channels*.

    This is channels-last, the faster one, unless *model* needs contiguous images, as `view`
    behind a convolution does. Raises `ConfigError` about *what* if no layout fits all sides.
    """
    model.eval()
    for layout in (torch.channels_last, torch.contiguous_format):
        try:
            for side in sides:
                image = torch.zeros(1, channels, side, side, device=device)
                model(image.to(memory_format=layout))
        except RuntimeError as error:
            if is_memory_exhausted(error):
                raise
            failure = error
            failed_side = side
        else:
            return layout

    advice = describe_known(failure) or "choose another size"
    raise ConfigError(
        f"{what} cannot compute images of {failed_side} pixels; {advice}"
    ) from failure
