"""The families of second-order networks: which names belong to one, and what a family's name leads to."""

import re
from collections.abc import Iterable

from sopdeploy.errors import shorten

PAGE = "docs/second-order.md"
# The word in the names of networks and recipes, and the family's name in its paper
SECOND_ORDER = {"dsop": "DSoP", "gsop": "GSoP", "gmsop": "GM-SOP", "isqrt": "iSQRT-COV"}


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
