"""The kinds of data a recipe can name, and the one function that opens them."""

from typing import Annotated

import pydantic

from sopdeploy.data.base import Split
from sopdeploy.data.datasets.folder import FolderConfig, open_folder
from sopdeploy.data.datasets.places import PlacesConfig, open_places
from sopdeploy.data.datasets.small import CifarConfig, DigitsConfig, open_cifar, open_digits
from sopdeploy.data.datasets.small_imagenet import SmallImageNetConfig, open_small_imagenet
from sopdeploy.data.image_files import Opening, Say
from sopdeploy.data.validation import without_unreadable

DataConfig = Annotated[
    DigitsConfig | FolderConfig | CifarConfig | SmallImageNetConfig | PlacesConfig,
    pydantic.Field(discriminator="kind"),
]


def open_data(config: DataConfig, say: Say = lambda _line: None) -> Split:
    """Return the pictures to learn from and those held out; *say* is told what takes long or is left out.

    Raises `ConfigError` where no path is set, `DataError` naming what is wrong with the data.
    """
    match config:
        case DigitsConfig():
            return open_digits()
        case CifarConfig():
            return open_cifar(config)
        case SmallImageNetConfig():
            return open_small_imagenet(config)
        case FolderConfig() | PlacesConfig():
            opening = Opening(config.cache, say)
            found = open_folder(config, opening) if config.kind == "folder" else open_places(config, opening)
            return without_unreadable(found, opening) if config.skip_corrupt else found
