"""The names of ImageNet's 1000 classes (ILSVRC 2012), as published weights have them, by WordNet ID."""

from functools import cache
from importlib import resources

CLASSES = "imagenet_classes.txt"  # WordNet ID and name of each class, in the order of published weights


@cache
def class_aliases() -> dict[str, str]:
    """Map the WordNet ID of each ImageNet class to the name that published weights have, and back."""
    lines = resources.files("sopdeploy.data.datasets").joinpath(CLASSES).read_text("utf-8").splitlines()
    pairs = [line.split(" ", 1) for line in lines]
    return {first: second for pair in pairs for first, second in (pair, pair[::-1])}
