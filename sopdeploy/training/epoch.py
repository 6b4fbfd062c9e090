"""What an epoch sees, a function of the recipe and the epoch: the samples of its steps, and its pictures."""

from sopdeploy.data.augment import Augmented
from sopdeploy.data.base import Pictures
from sopdeploy.data.batches import balanced_batches, shuffled_batches
from sopdeploy.recipe import Recipe


def epoch_batches(recipe: Recipe, pictures: Pictures, epoch: int) -> list[list[int]]:
    """Return the samples of each step of *epoch*."""
    if recipe.sampler == "balanced":
        return balanced_batches(pictures.targets, recipe.batch_size, recipe.seed, epoch)
    return shuffled_batches(len(pictures), recipe.batch_size, recipe.seed, epoch)


def epoch_view(recipe: Recipe, pictures: Pictures, epoch: int) -> Augmented:
    """Return *pictures* as the network sees them in *epoch*, augmented."""
    return Augmented(pictures, recipe.augment, recipe.preprocess, recipe.seed, epoch, recipe.distort)
