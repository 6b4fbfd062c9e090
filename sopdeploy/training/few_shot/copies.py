"""Groups of copies without a run, by features of the default network whose weights are on this machine."""

from collections.abc import Callable

from sopdeploy.importers.published import find_lite_weights
from sopdeploy.photos.copies import Groups, connect
from sopdeploy.photos.photo import LabeledImages
from sopdeploy.training.distributed import Strategy, select_device
from sopdeploy.training.few_shot.features import Features
from sopdeploy.training.recipe import Recipe, read_recipe
from sopdeploy.training.start_weights import create_initial_model


def has_default_weights() -> bool:
    """Tell whether the ImageNet weights of the default network are on this machine; downloads nothing."""
    return find_lite_weights(_default_recipe().model.name) is not None


def group_by_features(images: LabeledImages, on_image: Callable[[int, int], None]) -> Groups:
    """Group *images* by the features of the default network, as `train` does; returns a number per image.

    *on_image* receives the numbers of images done and in total. Raises `DataError` for unreadable images.
    """
    recipe = _default_recipe()
    strategy = Strategy(select_device(recipe.device))
    model, recipe, _ = create_initial_model(recipe, ("one", "other"), strategy)  # its classes are not used
    features = Features(recipe, "gap", model.to(strategy.device), images, on_image)
    return connect(len(images), features.find_copies(images).pairs, features.hashes, images.groups)


def _default_recipe() -> Recipe:
    return read_recipe("photos", ["data.path=."])  # required, but not read
