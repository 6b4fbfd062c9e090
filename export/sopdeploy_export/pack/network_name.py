"""How the model card and the page name the network that ships: with its options, and without what was removed."""

from sopdeploy.config import StrictModel
from sopdeploy.errors import ConfigError
from sopdeploy.models.base import Classifier
from sopdeploy.models.families import SECOND_ORDER, describe_options
from sopdeploy.models.registry import entry
from sopdeploy_export.subject import ExportSubject


def name_network(subject: ExportSubject) -> str:
    """Name the network of *subject* with its options, the parts that were removed, and what is left of it.

    The options are those of the network itself. A network of the user has none, and its name is
    not looked up.
    """
    network = subject.network
    config = getattr(network, "config", None)
    if not isinstance(network, Classifier) or not isinstance(config, StrictModel):
        return subject.name

    named = describe_options(subject.name, config, _changed_options(subject.name, config))
    if not subject.detachment.training_only:
        return named
    removed = ", ".join(subject.detachment.training_only)
    plain = _plain_network(subject.name, network)
    return f"{named} without {removed}{f', which is {plain}' if plain else ''}"


def _changed_options(name: str, config: StrictModel) -> list[str]:
    """List the options of *config* that are not those of the network *name* of the catalog."""
    try:
        default = entry(name).make_config({})
    except ConfigError:  # the user gave the name
        return []
    return [key for key, value in config if value != getattr(default, key, None)]


def _plain_network(name: str, network: Classifier) -> str:
    """Name the network of the catalog that is left of *network*; "" unless it is of the same class."""
    family, _, rest = name.partition("-")
    if family not in SECOND_ORDER or not rest:
        return ""

    try:
        plain = entry(rest)
    except ConfigError:  # nothing has this name
        return ""
    is_left = plain.network.inference_class is type(network).inference_class
    return f"{rest} ({plain.summary})" if is_left else ""
