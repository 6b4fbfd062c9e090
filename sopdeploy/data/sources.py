"""The kinds of data a recipe can name, and the one function that opens them."""

from typing import Annotated

import pydantic

from sopdeploy.data.base import Split
from sopdeploy.data.cifar import CifarConfig, open_cifar
from sopdeploy.data.digits import DigitsConfig, open_digits
from sopdeploy.data.folder import FolderConfig, open_folder

DataConfig = Annotated[DigitsConfig | FolderConfig | CifarConfig, pydantic.Field(discriminator="kind")]


def open_data(config: DataConfig) -> Split:
    """Return the pictures to learn from and those held out.

    Raises `ConfigError` where no path is set, `DataError` naming what is wrong with the data.
    """
    match config:
        case DigitsConfig():
            return open_digits()
        case CifarConfig():
            return open_cifar(config)
        case FolderConfig():
            return open_folder(config)
