"""The data sources that a recipe can name, and the function that opens them."""

from typing import Annotated

import pydantic

from sopdeploy.data.base import Split
from sopdeploy.data.datasets.folder import FolderConfig, open_folder
from sopdeploy.data.datasets.places import PlacesConfig, open_places
from sopdeploy.data.datasets.small import CifarConfig, DigitsConfig, open_cifar, open_digits
from sopdeploy.data.datasets.small_imagenet import SmallImageNetConfig, open_small_imagenet
from sopdeploy.data.folder_store import Log, OpenOptions
from sopdeploy.data.validation import drop_unreadable

DataConfig = Annotated[
    DigitsConfig | FolderConfig | CifarConfig | SmallImageNetConfig | PlacesConfig,
    pydantic.Field(discriminator="kind"),
]


def open_data(config: DataConfig, log: Log = lambda _line: None) -> Split:
    """Open the training and held-out images of *config*.

    Slow steps and skipped files are reported to *log*. Raises `ConfigError` if no path is set and `DataError`
    if the data cannot be used.
    """
    match config:
        case DigitsConfig():
            return open_digits()
        case CifarConfig():
            return open_cifar(config)
        case SmallImageNetConfig():
            return open_small_imagenet(config)
        case FolderConfig() | PlacesConfig():
            options = OpenOptions(config.cache, log)
            split = open_folder(config, options) if config.kind == "folder" else open_places(config, options)
            return drop_unreadable(split, options) if config.skip_corrupt else split
