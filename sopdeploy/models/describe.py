"""Describe a network: counts of training and inference model, beside the figures that papers print.

Conventions: parameters are all learnable tensors (including batch norm's affine, excluding
running statistics); MACs are the multiply-adds of convolutions and linear layers for one image,
without bias. A mixture counts the K of its N components that it evaluates per image. Layers
count if their module is called, and `nn.MultiheadAttention`; gates, and code that reads the
weights of layers itself, do not.
"""

import tomllib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from itertools import chain
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sopdeploy.base.config import FieldValues, StrictModel
from sopdeploy.errors import ConfigError, shorten
from sopdeploy.layers.isqrt_cov import ISqrtCov
from sopdeploy.layers.mixture import Components
from sopdeploy.models.base import Classifier
from sopdeploy.models.families import SECOND_ORDER, describe_options
from sopdeploy.models.registry import create_model, entry, make_config
from sopdeploy.models.second_order_head import without_head

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# the divisors of GSoP's Table 5
RESNET50_PARAMS = 25.5e6
RESNET50_OPS = 3.86e9
# Operations in DSoP's tables; 42 d^3 per root is fitted
PER_NORM_OUTPUT = 5
PER_ROOT_PRODUCT = 42
Unit = Literal["M", "G", "K", "x"]


class Counts(StrictModel):
    """Learnable parameters, and multiply-adds of one image."""

    parameters: int
    macs: int


@dataclass
class Tally:
    """Counts by the names of tensors and modules; outputs of batch norms, and d^3 of covariance roots."""

    parameters: Counter[str] = field(default_factory=Counter)
    macs: Counter[str] = field(default_factory=Counter)
    norm_outputs: int = 0
    root_products: int = 0

    def total(self) -> Counts:
        """Sum the counts of the whole network."""
        return Counts(parameters=self.parameters.total(), macs=self.macs.total())

    def by_part(self, split: Collection[str]) -> dict[str, Counts]:
        """Sum the counts of each child; children named in *split* are divided into their own children."""
        parameters = Counter[str]()

        macs = Counter[str]()
        for sums, counts in ((parameters, self.parameters), (macs, self.macs)):
            for name, number in counts.items():
                path = name.split(".")
                depth = 2 if path[0] in split else 1
                sums[".".join(path[:depth])] += number

        return {part: Counts(parameters=n, macs=macs[part]) for part, n in parameters.items()}


def tally(network: nn.Module, image_size: int, channels: int = 3) -> Tally:
    """Count parameters and multiply-adds of *network*, on `meta` or the CPU, in its current mode.

    It runs on one image of *image_size* pixels with so many *channels*.
    """
    counts = Tally(
        parameters=Counter({name: p.numel() for name, p in network.named_parameters()})
    )

    # Each call of a module adds its operations; a ScriptModule has no hooks.
    handles = [
        part.register_forward_hook(partial(_count_call, counts, name), with_kwargs=True)
        for name, part in network.named_modules()
        if not isinstance(part, torch.jit.ScriptModule)
    ]

    # Batch norms take most of the time, also on `meta`, so they return their input. An
    # attribute `forward` of the instance hides the method of the class until it is deleted; one
    # that a caller has set stays.
    norms: list[Any] = [
        part
        for part in network.modules()
        if isinstance(part, NORMS) and "forward" not in vars(part)
    ]
    for norm in norms:
        norm.forward = _view_first_input

    # One black image goes through the network.
    tensors = chain(network.parameters(), network.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("meta"))
    try:
        with torch.no_grad():
            network(torch.zeros(1, channels, image_size, image_size, device=device))
    finally:
        for norm in norms:
            del norm.forward
        for handle in handles:
            handle.remove()
    return counts


def _view_first_input(*inputs: Any, **keywords: Any) -> Any:
    """Return a new tensor, because hooks of callers identify modules by their output."""
    values, *_ = *inputs, *keywords.values()  # a subclass of a batch norm can have more inputs
    return values.view_as(values)


def _count_call(
    counts: Tally,
    name: str,
    module: nn.Module,
    inputs: tuple[Any, ...],
    keywords: dict[str, Any],
    returned: Any,
) -> None:
    """Add to *counts* the operations of a call of *module*.

    The network runs on one image; the inputs of a module may have many rows, such as windows.
    """
    output = next((leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)), None)
    if output is None:
        return

    # Multiply-adds of layers; for DSoP's tables, outputs of batch norms and d^3 of roots, too.
    if isinstance(module, Components):
        counts.macs[name] += module.macs(inputs[0].shape)
    elif isinstance(module, nn.Linear):
        counts.macs[name] += output.numel() * module.in_features
    elif isinstance(module, nn.Conv1d | nn.Conv2d):
        counts.macs[name] += output.numel() * module.weight[0].numel()
    elif isinstance(module, nn.MultiheadAttention):  # calls no module for its four projections
        tensors = {**dict(zip(("query", "key", "value"), inputs, strict=False)), **keywords}
        # The inputs of a subclass are not known; it is taken for self-attention.
        if type(module).forward is not nn.MultiheadAttention.forward:
            tensors = dict.fromkeys(("query", "key", "value"), output)
        query, keys, values = (tensors[key].numel() for key in ("query", "key", "value"))
        counts.macs[name] += (2 * query + keys + values) * module.embed_dim
    elif isinstance(module, NORMS):
        counts.norm_outputs += output.numel()
    elif isinstance(module, ISqrtCov):
        counts.root_products += module.width**3


class PublishedRow(StrictModel):
    """One network of a paper's table, as printed; `published.toml` documents the fields."""

    source: str
    model: str
    config: FieldValues = pydantic.Field(default_factory=dict)
    num_classes: int | None = None
    part: Literal["training", "shipped"] = "shipped"
    module: str = ""
    params: float | None = None
    ops: float | None = None
    dim: float | None = None
    times_resnet50: bool = False
    dsop_ops: bool = False
    extra_ops: int = 0
    cut: bool = False
    reached: bool = True
    note: str = ""


class Published(StrictModel):
    """One printed figure and the package's own count, both in `unit`.

    Units: M (million), G (billion), K (thousand), x (times ResNet-50). `quantity` is, for
    example, "training parameters". `reached` is false if the package does not reproduce the
    figure; `note` gives the reason.
    """

    source: str
    quantity: str
    unit: Unit
    printed: float
    ours: float
    reached: bool = True
    note: str = ""

    def sentence(self) -> str:
        """Format the figure in one line."""
        note = f" ({self.note})" if self.note else ""
        figures = f"{self.printed} {self.unit}, here {self.ours} {self.unit}"
        return f"{self.source}: {self.quantity} {figures}{note}"


def _read_published_rows() -> tuple[PublishedRow, ...]:
    """Read the rows of `published.toml`; a row has the keys of its table, and options of both."""
    text = files("sopdeploy.models").joinpath("published.toml").read_text(encoding="utf-8")

    rows = []
    for table in tomllib.loads(text)["tables"]:
        shared = {key: value for key, value in table.items() if key != "rows"}
        for row in table["rows"]:
            config = {**shared.get("config", {}), **row.get("config", {})}
            rows.append(PublishedRow(**{**shared, **row, "config": config}))
    return tuple(rows)


PUBLISHED_ROWS: tuple[PublishedRow, ...] = _read_published_rows()


def find_published(
    name: str,
    config: StrictModel,
    num_classes: int,
    training: Tally,
    shipped: Tally,
    representation: int,
) -> tuple[Published, ...]:
    """Look up the figures that papers print for exactly this network.

    *training* and *shipped* are the counts of the whole network and of what is exported, at the
    image size of the catalog; *representation* is the length of the vector before the classifier.
    """
    figures: list[Published] = []
    for row in PUBLISHED_ROWS:
        if row.model != name or make_config(name, row.config) != config:
            continue
        classes_of_row = entry(name).num_classes if row.num_classes is None else row.num_classes
        if num_classes == classes_of_row:
            figures += _compare_with_row(
                row, training if row.part == "training" else shipped, representation
            )
    return tuple(figures)


def _compare_with_row(row: PublishedRow, counts: Tally, representation: int) -> list[Published]:
    """Put the own count, or the length of the *representation*, beside every printed figure of *row*."""
    # What the row counts: the parts below its module, plus operations that no module has.
    parameters = sum(n for name, n in counts.parameters.items() if name.startswith(row.module))

    operations = (
        sum(n for name, n in counts.macs.items() if name.startswith(row.module)) + row.extra_ops
    )
    if row.dsop_ops:  # DSoP's tables count batch norms and matrix roots too
        operations += (
            PER_NORM_OUTPUT * counts.norm_outputs + PER_ROOT_PRODUCT * counts.root_products
        )

    # Each printed figure, with its own count in the same unit.
    quantities: list[tuple[str, Unit, float | None, float]]
    if row.times_resnet50:
        quantities = [
            (f"{row.part} parameters", "x", row.params, parameters / RESNET50_PARAMS),
            (f"{row.part} operations", "x", row.ops, operations / RESNET50_OPS),
        ]
    else:
        quantities = [
            (f"{row.part} parameters", "M", row.params, parameters / 1e6),
            (f"{row.part} operations", "G", row.ops, operations / 1e9),
            ("representation", "K", row.dim, representation / 1e3),
        ]

    # Figures that the paper does not print are left out.
    notes = [note for note in (row.note, "cut off, not rounded" if row.cut else "") if note]
    figures = []
    for quantity, unit, printed, ours in quantities:
        if printed is not None:
            figure = Published(
                source=row.source,
                quantity=quantity,
                unit=unit,
                printed=printed,
                ours=round(ours, 4),
                reached=row.reached,
                note="; ".join(notes),
            )
            figures.append(figure)
    return figures


class Description(StrictModel):
    """Output of `sopdeploy models NAME`.

    `representation` is the length of the vector that the exported classifier reads. `parts` are
    the parts of the network in training and sum to `training`; `published` holds the figures that
    papers print for exactly this network, if any.
    """

    name: str
    config: FieldValues
    num_classes: int
    image_size: int
    training: Counts
    shipped: Counts
    representation: int
    training_only: tuple[str, ...]
    loss_weights: dict[str, float]
    parts: dict[str, Counts]
    published: tuple[Published, ...]


def describe(
    name: str, *, image_size: int | None = None, num_classes: int | None = None, **config: Any
) -> Description:
    """Count parameters and multiply-adds of model *name* without allocating weights (`meta` device).

    Args:
        name: A name that `create_model` accepts.
        image_size: Side of the input in pixels; by default the size of the paper.
        num_classes: Number of classes; by default the number of the paper.
        **config: Options of the network.

    Returns:
        The counts of the network in training and as it is exported, also by part, and the figures of
        the papers beside them.

    Raises:
        ConfigError: An unknown name, or a value that the network does not accept.

    Examples:
        >>> description = sopdeploy.describe("dsop-resnet50")
        >>> f"{description.training.parameters:,} -> {description.shipped.parameters:,}"
        '148,686,920 -> 25,557,032'
    """
    # Without values: `meta` tensors have shapes alone.
    side = entry(name).image_size if image_size is None else image_size
    with torch.device("meta"):
        network = create_model(name, num_classes=num_classes, **config)
        inference = network.inference_model() if network.training_only else None

    # Run it in train mode, and without the parts that only training needs.
    try:
        training = tally(network.train(), side)
        shipped = training if inference is None else tally(inference.eval(), side)
    # The code of timm or of the user can raise these, too.
    except (AssertionError, LookupError, RuntimeError, ValueError) as problem:
        raise ConfigError(
            f"image_size: {name} cannot compute images of {side} pixels; choose another size"
        ) from problem

    # The papers print their figures for one image size.
    representation = network.num_features
    figures: tuple[Published, ...] = ()
    if side == entry(name).image_size:
        figures = find_published(
            name, network.config, network.num_classes, training, shipped, representation
        )

    return Description(
        name=name,
        config=network.config.model_dump(mode="json"),
        num_classes=network.num_classes,
        image_size=side,
        training=training.total(),
        shipped=shipped.total(),
        representation=representation,
        training_only=network.training_only,
        loss_weights=network.loss_weights(),
        parts=training.by_part(network.training_only),
        published=figures,
    )


def name_network(name: str, network: nn.Module, removed: Sequence[str] = ()) -> str:
    """Name *network* with its options, the parts that were *removed*, and what is left of it.

    A network of the catalog is called by its *name* there. The name that a user gave to another
    network is not looked up.
    """
    config = getattr(network, "config", None)
    if not isinstance(network, Classifier) or not isinstance(config, StrictModel):
        return name

    # The options that differ from those of the name.
    try:
        default = make_config(name, {})
    except ConfigError:  # the user gave the name
        return name
    changed = [key for key, value in config if value != getattr(default, key, None)]
    named = describe_options(name, config, changed)
    if not removed:
        return named

    plain = _plain_network(name, network)
    return f"{named} without {', '.join(removed)}{f', which is {plain}' if plain else ''}"


def describe_exported(
    name: str, network: nn.Module, removed: Sequence[str], num_classes: int, parameters: int
) -> str:
    """Say what is left of *network* without its *removed* parts, and how it was trained.

    An example is "ResNet-8 for 10 classes, 75,290 parameters, trained with DSoP, branches removed".
    *parameters* counts what is left. The *name* is looked up as in `name_network`.
    """
    title = f"Network {name}"
    trained = ""
    if isinstance(network, Classifier):
        # A network of a family is called after what is left of it, if that is in the catalog.
        exported = name
        family, _, rest = name.partition("-")
        if removed and family in SECOND_ORDER and _is_in_catalog(rest):
            exported = rest
            trained = f", trained with {SECOND_ORDER[family]}"
        if _is_in_catalog(exported):
            title = entry(without_head(exported)).title
        if "isqrt" in getattr(getattr(network.config, "head", None), "kind", ""):
            title += " with a second-order head"

    classes = "1 class" if num_classes == 1 else f"{num_classes:,} classes"
    parts = f", {shorten(removed)} removed" if removed else ""
    return f"{title} for {classes}, {parameters:,} parameters{trained}{parts}"


def _is_in_catalog(name: str) -> bool:
    try:
        entry(name)
    except ConfigError:
        return False
    return True


def _plain_network(name: str, network: Classifier) -> str:
    """Name the network of the catalog that is left of *network*; "" unless it is of the same class."""
    family, _, rest = name.partition("-")
    if family not in SECOND_ORDER:
        return ""

    try:
        plain = entry(rest)
    except ConfigError:  # nothing has this name
        return ""
    is_left = plain.network.inference_class is type(network).inference_class
    return f"{rest} ({plain.summary})" if is_left else ""
