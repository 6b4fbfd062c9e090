"""Weights to start a run from: published ImageNet weights, a weight file of another project, a checkpoint.

Tensors are matched by name and shape. Only the parts that a network adds to its backbone may be
new: branches, pooling, attention blocks, and the classifier, which is new when the classes
differ.

Preprocessing values that the recipe's `[preprocess]` does not set are those of the start
weights.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pydantic
import torch
from torch import Tensor, nn

from sopdeploy.base.config import StrictModel, first_problem
from sopdeploy.base.files import expand_user
from sopdeploy.base.seeds import derive_seed
from sopdeploy.errors import ConfigError, WeightsError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import Classifier, is_in
from sopdeploy.models.registry import CatalogModel, create_model, entry, make_config
from sopdeploy.models.second_order_head import POOLED_HEAD, without_head
from sopdeploy.models.timm_networks import TimmBackbone
from sopdeploy.training.distributed import Strategy
from sopdeploy.training.settings.loop import StartConfig
from sopdeploy.training.settings.recipe import Recipe
from sopdeploy.weights.checkpoint import Checkpoint
from sopdeploy.weights.conversion import WeightFile
from sopdeploy.weights.files import WeightPath, check_is_file, check_is_weights
from sopdeploy.weights.import_weights import convert_weights, open_weights
from sopdeploy.weights.tensor_files import COUNTER

WeightSource = WeightPath | WeightFile | Checkpoint  # a file of weights, checked or opened
# That networks add to a backbone
ADDED_PARTS = {"pooling", "attention", "reduction", "root", "gate", "mixture", POOLED_HEAD}
# Names of classifiers in weight files
CLASSIFIER_PARTS = {"fc", "classifier", "linear", "head", "head_dist"}


class StartReport(StrictModel):
    """The weights that a run started from; part of its checkpoints.

    `loaded` counts tensors. `new` lists the parts of the network with random weights, `unused`
    the parts of the file that the network does not have.
    """

    file: str
    sha256: str
    network: str
    loaded: int
    new: tuple[str, ...]
    unused: tuple[str, ...]
    preprocess: Preprocess

    def describe(self) -> str:
        """Describe the file, the loaded tensors, and the new and unused parts in one line."""
        new = f"; new: {', '.join(self.new)}" if self.new else ""
        unused = f"; not used: {', '.join(self.unused)}" if self.unused else ""
        return f"pretrained weights: {self.file} ({self.network}), {self.loaded} tensors{new}{unused}"


@dataclass(frozen=True, kw_only=True, slots=True)
class StartWeights:
    """Tensors to start from, under the names of the catalog; `labels` are None if they are not known.

    `training_only` names parts of their network that only training needs.
    """

    file: str
    sha256: str
    network: str
    tensors: Mapping[str, Tensor]
    preprocess: Preprocess
    labels: tuple[str, ...] | None = None
    training_only: tuple[str, ...] = ()


def read_start_weights(
    recipe: Recipe, strategy: Strategy, source: WeightSource | None = None
) -> StartWeights | None:
    """Read the weights that `start.weights` of *recipe* selects; None for random weights.

    *source* is the file, if it was checked or opened before. The first process fetches
    published weights to the cache, then the others read them. Raises `ConfigError` if the value
    is missing or no weights are published, `WeightsError` or `CheckpointError` if the file
    cannot be fetched or read.
    """
    if recipe.start is None or recipe.start.weights == "none":
        return None

    if recipe.start.weights is None:
        raise ConfigError(
            "start.weights: not set; give the checkpoint to start from",
            remedies={"weights": "imagenet"},
        )

    file = recipe.start.weights
    weights = read_weights_file(recipe.model, file, source) if strategy.rank == 0 else None
    # This sum lets the others wait until the first process has filled the cache.
    strategy.all_reduce(torch.zeros(1))
    return read_weights_file(recipe.model, file, source) if weights is None else weights


def fetch_published(model: CatalogModel) -> tuple[Path, str]:
    """Find the ImageNet weights of the network *model*, or download them.

    Returns the file, and the catalog name under which the importers read it. Raises the errors of
    `fetch_imagenet_weights`.
    """
    from sopdeploy.weights.published import fetch_imagenet_weights  # noqa: PLC0415 # for downloads

    config = make_config(model.name, model.config)
    # `head:NAME` starts with the weights of NAME.
    name = without_head(model.name)
    return fetch_imagenet_weights(name, config)


def read_weights_file(
    model: CatalogModel, file: Literal["imagenet"] | Path, source: WeightSource | None = None
) -> StartWeights:
    """Read *file*, the weights that the network *model* starts from; "imagenet" are the published ones.

    *source* is this file, if it was checked or opened before.
    """
    # `head:resnet50` reads the file of `resnet50`.
    name = without_head(model.name)

    if isinstance(file, Path):
        path = expand_user(file)
        # `dsop-timm:NAME` reads the file of `timm:NAME`; importers know names without a colon
        # as they are.
        source_model = name.removeprefix("dsop-") if ":" in name else name
    else:  # "imagenet"
        path, source_model = fetch_published(model)

    if source is None:
        check_is_file(path)
        source = check_is_weights(path)
    if isinstance(source, WeightPath):
        source = open_weights(source)

    # A file of another project has its converter; the others are checkpoints.
    if isinstance(source, WeightFile):
        converted = convert_weights(source, source_model)
        return StartWeights(
            file=path.name,
            sha256=source.sha256,
            network=converted.description,
            tensors=converted.tensors,
            preprocess=converted.preprocess,
            labels=converted.class_names or None,
        )

    return StartWeights(
        file=path.name,
        sha256=source.sha256,
        network=source.model,
        tensors=source.weights,
        preprocess=source.preprocess,
        labels=source.labels,
        training_only=entry(source.model).network.training_only,
    )


def complete_preprocess(recipe: Recipe, base: Preprocess) -> Recipe:
    """Add the values of *base* that the `[preprocess]` of *recipe* does not set.

    If the recipe sets `crop` without `resize`, `resize` keeps the ratio of *base*. Raises
    `ConfigError`.
    """
    set_values = {
        name: getattr(recipe.preprocess, name) for name in recipe.preprocess.model_fields_set
    }

    if "crop" in set_values and "resize" not in set_values:
        set_values["resize"] = Preprocess.scaled_resize(
            set_values["crop"], base.resize, base.crop
        )

    try:
        values = {**base.model_dump(), **set_values}
        completed = Preprocess(**values)
    except pydantic.ValidationError as error:
        raise ConfigError(f"preprocess: {first_problem(error, values)}") from error

    return recipe.model_copy(update={"preprocess": completed})


def load_start_weights(
    weights: StartWeights, model: Classifier, labels: tuple[str, ...]
) -> StartReport:
    """Load the matching tensors of *weights* into *model*, whose classes are *labels*.

    Random weights remain in classifiers of another width or of other classes, and in parts that
    networks add to a backbone if the file has none that fit. Raises `WeightsError` for the first
    other tensor that does not fit, and for one to load that is not finite.
    """
    # The classifiers: linear layers with an output per class, if they have a usual name or are in a
    # branch. Others have so many outputs by chance.
    class_wide = class_wide_layers(model)
    classifiers = {classifier_name(model), *CLASSIFIER_PARTS.intersection(class_wide)}
    branch_classifiers = classifiers_of_branches(model)

    # What of the network keeps its random weights, even if shapes fit, and what may keep them
    # without an error.
    has_other_classes = weights.labels is not None and weights.labels != labels
    not_loaded = [*classifiers, *branch_classifiers] if has_other_classes else []
    training_only = (*model.training_only, *weights.training_only)
    may_be_new = (*not_loaded, *training_only, *classifiers)

    if isinstance(model, TimmBackbone):
        weights = replace(weights, tensors=model.fit_positions(weights.tensors))
    matching, new = _match_tensors(weights, model, not_loaded, may_be_new)

    # Tensors that the network does not have belong to parts that it does not need, or are a
    # mistake.
    unused: set[str] = set()
    for name in sorted(weights.tensors.keys() - model.state_dict().keys()):
        part = _added_part(name, (*training_only, *CLASSIFIER_PARTS))
        if part is None:
            raise _misfit_error(weights, f"the network of the recipe has no {name}")
        unused.add(part)

    model.load_state_dict(matching, strict=False)  # after all checks
    return StartReport(
        file=weights.file,
        sha256=weights.sha256,
        network=weights.network,
        loaded=len(matching),
        new=new,
        unused=tuple(sorted(unused)),
        preprocess=weights.preprocess,
    )


def class_wide_layers(model: Classifier) -> list[str]:
    """List the names of the linear layers of *model* with an output per class."""
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == model.num_classes
    ]


def classifiers_of_branches(model: Classifier) -> list[str]:
    """List the names of the classifiers in the auxiliary branches of *model*."""
    return [name for name in class_wide_layers(model) if is_in(name, *model.training_only)]


def set_new_classifiers_to_zero(model: Classifier, new: Collection[str]) -> None:
    """Set the classifiers of *model* and of its branches to 0 if they are in one of the *new* parts."""
    for name in (classifier_name(model), *classifiers_of_branches(model)):
        if is_in(name, *new):
            for parameter in model.get_submodule(name).parameters():
                nn.init.zeros_(parameter)


def _match_tensors(
    weights: StartWeights,
    model: Classifier,
    not_loaded: Collection[str],
    may_be_new: tuple[str, ...],
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Find the tensors of *weights* to load, and list the parts of *model* that keep random weights.

    The parts *not_loaded* keep them in any case, those that *may_be_new* if the file has no
    tensor that fits.
    """
    own = model.state_dict()

    # The module around the classifier: `classifier` of `classifier.6`, "" of `fc`. It may contain
    # the backbone, to which the first tensor belongs.
    container = classifier_name(model).rpartition(".")[0]
    contains_backbone = is_in(next(iter(own)), container)
    # A file may have nothing of it, such as the head of a mixture with its batch norm.
    is_new_container = not any(is_in(name, container) for name in weights.tensors)

    # Each tensor is loaded, in a new part, a counter that files may lack, or an error.
    matching: dict[str, Tensor] = {}
    new: set[str] = set()
    for name, tensor in own.items():
        stored = None if is_in(name, *not_loaded) else weights.tensors.get(name)
        if stored is not None and stored.shape == tensor.shape:
            if stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
                problem = f"{name} has values that are not finite; choose another file"
                raise WeightsError(f"start.weights: {weights.file}: {problem}")
            matching[name] = stored
        elif part := _added_part(name, may_be_new):
            new.add(part)
        elif stored is None and is_in(name, container) and is_new_container:
            new.add(container)
        elif stored is None:
            if not name.endswith(COUNTER):  # a file may lack counters of batches
                raise _misfit_error(weights, f"{name} is missing")
        elif is_in(name, container) and not contains_backbone:
            # Another pooling gives this layer an input of another length.
            new.add(name.rpartition(".")[0])
        else:
            raise _misfit_error(
                weights, f"{name} is {tuple(stored.shape)}, not {tuple(tensor.shape)}"
            )

    return matching, tuple(sorted(new))


class InitialModel(NamedTuple):
    """A model before training, its recipe with complete preprocessing, and the report on start weights."""

    model: Classifier
    recipe: Recipe
    start: StartReport | None


def create_initial_model(
    recipe: Recipe,
    labels: tuple[str, ...],
    strategy: Strategy,
    source: WeightSource | None = None,
) -> InitialModel:
    """Create the model of *recipe* for the classes *labels*; random weights depend on the seed.

    *source* is the file of `start.weights`, if it was checked or opened before. The recipe that is
    returned depends on `start.weights`:

    - without a table `start`, it stays as it is,
    - with weights, these are loaded, and their preprocessing completes that of the recipe,
    - with "none", the default preprocessing completes it.

    For a network that takes images of one size, this size replaces the crop that completes it.

    Raises the errors of `read_start_weights` and `load_start_weights`.
    """
    weights = read_start_weights(recipe, strategy, source)
    model = create_sized(recipe, len(labels), {} if weights is None else weights.tensors)

    if recipe.start is None:
        return InitialModel(model, recipe, None)
    start = None if weights is None else load_start_weights(weights, model, labels)
    is_zero = isinstance(recipe.start, StartConfig) and recipe.start.new_classifier == "zero"
    if start is not None and is_zero:
        set_new_classifiers_to_zero(model, start.new)
    preprocess = Preprocess() if weights is None else weights.preprocess
    return InitialModel(model, complete_preprocess(recipe, fit_crop(preprocess, model)), start)


def fit_crop(preprocess: Preprocess, model: Classifier) -> Preprocess:
    """Return *preprocess* with the size of the images of *model*, if it takes images of one size only."""
    side = model.fixed_size if isinstance(model, TimmBackbone) else None
    if side is None or side == preprocess.crop:
        return preprocess
    resize = Preprocess.scaled_resize(side, preprocess.resize, preprocess.crop)
    return preprocess.model_copy(update={"crop": side, "resize": resize})


def create_sized(recipe: Recipe, num_classes: int, tensors: Mapping[str, Tensor]) -> Classifier:
    """Create the model of *recipe* as `create_for` does; random weights depend on the seed alone.

    The size of the images is `preprocess.crop`, if the recipe sets it.
    """
    name = recipe.model.name
    config = recipe.model.config

    def create(**size: int) -> Classifier:
        torch.manual_seed(derive_seed(recipe.seed, "weights"))
        return create_model(name, num_classes=num_classes, **config, **size)

    has_crop = "crop" in recipe.preprocess.model_fields_set
    size = recipe.preprocess.crop if has_crop else None
    return create_for(tensors, create, config, size)


def create_for(
    tensors: Mapping[str, Tensor],
    create: Callable[..., Classifier],
    config: Mapping[str, Any],
    size: int | None = None,
) -> Classifier:
    """Create a model with the options *config* by *create*, for images of *size* pixels.

    Most networks take any size. A network of timm with position embeddings is for images of one
    size. The first of these that is known counts: `image_size` in *config*, *size*, the size that
    the start weights *tensors* are for, and timm's default.
    """
    model = create()
    if not isinstance(model, TimmBackbone) or model.fixed_size is None:
        return model
    if "image_size" in config:
        return model

    # A model for another size is created again, because the size decides the weights.
    side = model.size_of(tensors) if size is None else size
    return model if side is None or side == model.fixed_size else create(image_size=side)


def classifier_name(model: Classifier) -> str:
    """Return the name of the last linear layer of the exported network.

    A network without one classifies by a convolution: its last layer with weights.
    """
    exported = [
        (name, module)
        for name, module in model.named_modules()
        if not is_in(name, *model.training_only)
    ]

    linear: list[str] = [name for name, module in exported if isinstance(module, nn.Linear)]
    if linear:
        return linear[-1]

    return [
        name
        for name, module in exported
        if any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
    ][-1]


def _added_part(name: str, parts: tuple[str, ...]) -> str | None:
    """Find the part that contains the tensor *name*: one of *parts*, or one that `ADDED_PARTS` names."""
    for part in parts:
        if is_in(name, part):
            return part

    levels = name.split(".")
    for depth, level in enumerate(levels, 1):
        if level in ADDED_PARTS:
            return ".".join(levels[:depth])
    return None


def _misfit_error(weights: StartWeights, difference: str) -> WeightsError:
    """Build the error of *weights* for another backbone."""
    return WeightsError(
        f"start.weights: {weights.file} ({weights.network}) does not fit: "
        f"{difference}; give weights of the same backbone, or choose another "
        "model.name"
    )
