"""What is known of a value of an ONNX graph for every batch size, and of the operator that reads it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

# Batch sizes for which shapes are computed: the limits of `--max-batch` above 1, and the last
# size but one.
BATCHES = (2, 999_999, 1_000_000)
Shapes = Sequence[tuple[int, ...]]  # one for each batch size


class BatchLayout(NamedTuple):
    """The batch axis of a value, and how many neighboring rows along it belong to one image.

    For example, (batch * 3, 4) has `axis` 0 and `run_length` 3 if rows 0 to 2 belong to the first
    image. `axis` is None for a value without a batch axis. `run_length` is None then, too, and if
    all rows are equal, so that they fit any image.
    """

    axis: int | None = None
    run_length: int | None = None


NO_BATCH = BatchLayout()


class Integers(NamedTuple):
    """What the integers of a value are: `per_image` * i + an offset from `low` to `high`.

    i is the number in the batch of the image to which an integer belongs; the offset depends on
    no other image. With `only_first`, this holds for the first integers along the last axis,
    and the others have no number of an image in them.
    """

    per_image: int
    low: int
    high: int
    only_first: bool = False

    def select_own(self, rows_of_image: int) -> bool:
        """Return whether each, as an index, selects one of the *rows_of_image* neighboring rows of its image."""
        return self.per_image == rows_of_image and self.low >= 0 and self.high < rows_of_image


class MixesError(Exception):
    """An operator may combine several images. A rule raises this unless it shows the contrary."""


def require(fact: bool) -> None:
    """Raise `MixesError` unless *fact*, a condition of a rule, holds."""
    if not fact:
        raise MixesError


@dataclass(frozen=True, slots=True)
class TracedValue:
    """What is known of a value; `shapes` and `contents` have one item for each size in `BATCHES`."""

    type: int = 0  # in the numbering of ONNX
    shapes: Shapes = ()  # empty if they are unknown
    contents: Sequence[NDArray[Any]] = ()  # empty unless it is small and no image changes it
    layout: BatchLayout = NO_BATCH
    integers: Integers | None = None  # None if nothing is known of them
    mixed: tuple[str, ...] = ()  # the operators through which the value depends on other images

    @property
    def batch_axis(self) -> int | None:
        """The batch axis."""
        return self.layout.axis

    @property
    def has_image_numbers(self) -> bool:
        """Whether the number of an image in its batch is in its content."""
        return self.integers is not None and self.integers.per_image != 0

    @property
    def rows_of_image(self) -> int:
        """How many neighboring rows along the batch axis belong to one image; 1 if all rows are equal."""
        return self.layout.run_length or 1

    @property
    def has_row_per_image(self) -> bool:
        """Whether the first axis is that of the batch, with one row for each image."""
        return self.batch_axis == 0 and self.shapes[0][0] == BATCHES[0]

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.shapes[0])

    @property
    def depends_on_batch_size(self) -> bool:
        """Whether the contents differ between the sizes in `BATCHES`; False if they are not known."""
        return any(not np.array_equal(content, self.contents[0]) for content in self.contents)

    def layout_at(self, axis: int) -> BatchLayout:
        """Return the layout with the batch axis, if any, moved to *axis*."""
        return NO_BATCH if self.batch_axis is None else self.layout._replace(axis=axis)

    def layout_shifted(self, axes: int) -> BatchLayout:
        """Return the layout with the batch axis, if any, moved by *axes* to the right."""
        if self.batch_axis is None:
            return NO_BATCH
        return self.layout._replace(axis=self.batch_axis + axes)

    def numbers(self) -> list[int]:
        """List the integers of a constant; raise `MixesError` if they are not known or not constant."""
        require(len(self.contents) > 0 and not self.depends_on_batch_size)

        # The contents are equal for every batch size.
        return [int(number) for number in self.contents[0].reshape(-1)]


class OperatorCall:
    """What a rule reads of an operator.

    `x` is its first input, `shapes` and `rank` are those of its first result, `present` are its
    inputs without the optional ones that are absent.
    """

    def __init__(
        self, node: onnx.NodeProto, inputs: Sequence[TracedValue | None], shapes: Shapes
    ) -> None:
        self.attributes = {
            item.name: helper.get_attribute_value(item) for item in node.attribute
        }
        self.inputs = inputs
        self.shapes = shapes
        self.rank = len(shapes[0])
        self.present = [value for value in inputs if value is not None]
        self.num_outputs = len([name for name in node.output if name])  # "": nothing reads it
        self.x = self[0]

    def __getitem__(self, index: int) -> TracedValue:
        """Return input *index*, which the rule needs; without it, images count as mixed."""
        value = self.inputs[index] if index < len(self.inputs) else None
        if value is None:
            raise MixesError
        return value

    def axis_attribute(self, default: int, rank: int | None = None) -> int:
        """Return the attribute `axis`, or *default*, counted from 0.

        It is an axis of a value of *rank*; of `x` without *rank*. For a scalar it is 0, as in torch.
        """
        rank = self.x.rank if rank is None else rank
        return int(self.attributes.get("axis", default)) % max(rank, 1)

    def axes_operand(self, index: int, default: Sequence[int]) -> list[int]:
        """List axes of `x`, counted from 0: those in input *index*, else in the attribute `axes`, else *default*."""
        operand = self.inputs[index] if index < len(self.inputs) else None
        listed = self.attributes.get("axes", default) if operand is None else operand.numbers()
        return [int(axis) % max(self.x.rank, 1) for axis in listed]


def batch_axis_of(shapes: Shapes) -> int | None:
    """Return the axis whose size is a multiple of the batch size; None if all sizes are constant.

    Raises `MixesError` if several sizes change, or one changes in another way.
    """
    axes = [axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
    if not axes:
        return None
    require(len(axes) == 1)

    # Its size must be the same multiple of every batch size.
    batch_axis = axes[0]
    sizes_by_batch = [shape[batch_axis] for shape in shapes]
    rows_of_image = sizes_by_batch[0] // BATCHES[0]
    require(sizes_by_batch == [rows_of_image * batch for batch in BATCHES])
    return batch_axis
