"""An importer of a plug-in: weight files of text, a name and a shape per line; all tensors are zeros."""

from dataclasses import dataclass
from pathlib import Path

import torch

import sopdeploy
from sopdeploy.weights.conversion import ConvertedWeights, WeightFile

MAGIC = b"ACME-WEIGHTS"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFile(WeightFile):
    """A weight file of text."""


class TextWeights:
    """Reads and converts the files."""

    def read(self, path: Path, sha256: str) -> TextFile:
        """Read the lines behind the magic."""
        words = [line.split() for line in path.read_text(encoding="utf-8").splitlines()[1:]]
        tensors = {name: torch.zeros(tuple(map(int, shape))) for name, *shape in words}
        return TextFile(path=path, sha256=sha256, tensors=tensors)

    def convert(self, file: WeightFile, _model: str) -> ConvertedWeights | None:
        """Return the tensors as they are; None for files of other projects."""
        if not isinstance(file, TextFile):
            return None
        return ConvertedWeights(
            project="Acme",
            description="Acme's ResNet-8",
            model="resnet8",
            tensors=file.tensors,
            num_classes=len([*file.tensors.values()][-1]),  # the bias of the classifier
            imagenet=False,
        )


_text = TextWeights()
sopdeploy.register_importer(
    "acme",
    sopdeploy.Importer(marks=("conv1",), convert=_text.convert, magic=MAGIC, read=_text.read),
)
