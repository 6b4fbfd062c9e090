"""The families of second-order networks: which names belong to one, and how a network is named with its options."""

import json
import re
from collections.abc import Collection, Iterable, Iterator

from sopdeploy.base.config import StrictModel
from sopdeploy.errors import shorten

PAGE = "docs/second-order.md"
# The word in the names of networks and recipes, and the family's name in its paper
SECOND_ORDER = {"dsop": "DSoP", "gsop": "GSoP", "gmsop": "GM-SOP", "isqrt": "iSQRT-COV"}

# The options that tell networks of one name apart, in the order in which they are shown
KEY_OPTIONS = (
    "components", "chosen", "component_widths", "gate_widths", "cov_width", "aux_widths", "pooling",
    "final_pooling", "head", "iterations",
)  # fmt: skip


def find_family(text: str) -> str | None:
    """Find the word of the family that *text* names, such as "gmsop" of "GM-SOP"; None if it names none."""
    letters = _only_letters(text)
    for word, title in SECOND_ORDER.items():
        if letters in (word, _only_letters(title)):
            return word
    return None


def _only_letters(text: str) -> str:
    return re.sub(r"[^a-z]", "", text.lower())


def names_of_family(word: str, names: Iterable[str]) -> list[str]:
    """List those of *names*, of networks or recipes, that belong to the family *word*."""
    return [name for name in names if word in name.split("-")]


def lead_on(text: str, noun: str, names: Iterable[str]) -> str:
    """Say what the name of a family leads to, where a network or recipe is expected; "" for another *text*.

    *noun* is "networks" or "recipes", and *names* are all of these.
    """
    word = find_family(text)
    if word is None:
        return ""

    listed = shorten(names_of_family(word, names))
    other = "recipes" if noun == "networks" else "models"
    return (
        f"the {noun} of {SECOND_ORDER[word]} are {listed}; "
        f"see also `sopdeploy {other} {word}` and {PAGE}"
    )


def describe_options(name: str, config: StrictModel, given: Collection[str] = ()) -> str:
    """Name a network with its options: those that were *given*, and the `KEY_OPTIONS` of its family.

    An example is "gmsop-16-8-resnet18 (components=4, chosen=2, iterations=5)".
    """
    options = ", ".join(_options(config, given))
    return f"{name} ({options})" if options else name


def _options(config: StrictModel, given: Collection[str]) -> Iterator[str]:
    """Yield the options that `describe_options` shows, also those of a pooling or head with a matrix square root."""
    is_second_order = "iterations" in type(config).model_fields
    for key in (*KEY_OPTIONS, *(other for other in given if other not in KEY_OPTIONS)):
        value = getattr(config, key, None)
        if isinstance(value, StrictModel):
            if "iterations" in type(value).model_fields or key in given:
                yield f"{key}={getattr(value, 'kind', '')}"
                yield from _options(value, ("width",))
        elif value is not None and (key in given or is_second_order):
            yield f"{key}={value if isinstance(value, str) else json.dumps(value)}"
