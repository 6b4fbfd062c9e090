"""`sopdeploy import`: convert published weights to a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import pydantic

from sopdeploy.base.config import Options
from sopdeploy.cli.command import command, expand_options
from sopdeploy.cli.console import print_field
from sopdeploy.training.settings.recipe_files import parse_override
from sopdeploy.weights.files import check_is_weights

if TYPE_CHECKING:
    from sopdeploy.weights.import_weights import ImportReport

ImageSide = Annotated[int | None, pydantic.Field(ge=1)]


class ImportOptions(Options):
    """Class names, input size and order of the covariance vector, which a weight file does not contain."""

    KEYS: ClassVar = ("resize", "crop", "interpolation", "triangle")

    labels: Path | None = None
    """Class names in the order of the outputs: a .json list or text lines."""
    resize: ImageSide = None
    """Shorter side of the image in pixels."""
    crop: ImageSide = None
    """Side of the center crop in pixels."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Interpolation of the resize."""
    triangle: Literal["rows", "columns"] | None = None
    """Order of the covariance vector in the file, by default the order of its project."""


def _show(report: "ImportReport") -> None:
    """Print what was mapped and written."""
    rules = report.preprocess
    mean, std = (
        ", ".join(f"{value:.4g}" for value in values) for values in (rules.mean, rules.std)
    )
    geometry = f"resize {rules.resize}, crop {rules.crop}"

    print_field("found", report.looks_like)
    print_field("mapped", f"{report.num_tensors} tensors as {report.model}")
    print_field("input", f"{geometry}, {rules.interpolation}, mean {mean}, std {std}")
    print_field("classes", f"{report.num_classes}: {report.labels}")
    print_field("written", report.checkpoint)
    for note in report.notes:
        print_field("note", note)


@command(
    _show,
    examples=(
        "sopdeploy import resnet50-0676ba61.pth --as resnet50",
        "sopdeploy import net-epoch-60.mat --as gmsop-16-8-resnet18 --labels names.txt",
    ),
)
@expand_options
def import_file(
    file: Path,
    *,
    as_: str,
    out_file: Path = Path("ckpt.pt"),
    option: Sequence[str] = (),
    options: ImportOptions,
) -> "ImportReport":
    """Convert published weights: fast-MPN-COV, GSoP, GM-SOP, torchvision, timm, CIFAR ResNets.

    Args:
        file: Weights: .pth, .pth.tar, .th, .safetensors, or MatConvNet's .mat.
        as_: The network: a name of `sopdeploy models`.
        out_file: The checkpoint to write.
        option: Option KEY=VALUE of the network; repeatable.
    """
    source = check_is_weights(file)
    from sopdeploy.weights.import_weights import import_weights

    settings = dict(map(parse_override, option))
    preprocess = options.model_dump(exclude={"labels", "triangle"}, exclude_none=True)
    return import_weights(
        source,
        as_,
        out_file,
        settings,
        labels=options.labels,
        preprocess=preprocess,
        triangle=options.triangle,
    )
