"""Weight files of timm, for its networks in the catalog (`timm:NAME`), under timm's own names.

How timm prepares pictures depends on who trained the weights. Files of its hub lie beside a `config.json`
that says it; without one, what timm says of its default weights is taken.
"""

import importlib

from sopdeploy.backbones.timm_backbone import import_timm
from sopdeploy.errors import WeightsError
from sopdeploy.importers.resnets import CARD, FROM_CARD, matrix, preprocess_of, read_card
from sopdeploy.importers.source import Translation, WeightFile, renamed

PREFIX = "timm:"
NO_CARD = f"no {CARD} beside the file: preprocessing is that of timm's default weights"


class TimmNetwork:
    """Any network of timm that the catalog takes."""

    project = "timm"

    def recognises(self, file: WeightFile, name: str) -> bool:
        """Say whether the user asks for timm's network."""
        return name.startswith(PREFIX) and not file.is_matconvnet

    def translate(self, file: WeightFile, name: str) -> Translation:
        """Return the network as it is."""
        backbone = name.removeprefix(PREFIX)
        import_timm(backbone)
        stored = importlib.import_module("timm").get_pretrained_cfg(backbone).to_dict()
        card = read_card(file.path)
        classifier = stored.get("classifier")
        if not isinstance(classifier, str):
            raise WeightsError(f"{file.path}: timm's {backbone} has no single classifier to count classes by")
        return Translation(
            looks_like=f"timm's {backbone}",
            name=name,
            mapped=renamed(file, lambda own: own),
            num_classes=len(matrix(file.path, file.tensors, f"{classifier}.weight")),
            preprocess=preprocess_of(file.path, {**stored, **card}),
            labels="imagenet",
            notes=(FROM_CARD if card else NO_CARD,),
        )
