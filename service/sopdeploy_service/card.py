"""What a bundle says of itself to people: its model card and its certificate in short."""

import json
from typing import Any

from sopdeploy.bundle import Bundle
from sopdeploy.frozen import Frozen
from sopdeploy_service.schema import GATES

README = "README.md"


class Proved(Frozen):
    """The certificate in short: what was taken off, what was kept, and the roots of the graphs."""

    detached: tuple[str, ...]
    removed: int
    bytes_removed: int
    kept: int
    root: str
    onnx_root: str
    operations: int
    images: int
    largest_difference: float


class Card(Frozen):
    """The model card as Markdown; `experts` is how many a gate chooses among, 0 without a gate."""

    bundle: str
    text: str
    certificate: Proved | None
    experts: int


def read_card(bundle: Bundle) -> Card:
    """Return the card of *bundle*; its text is empty where the bundle has no README.md."""
    readme = bundle.path / README
    text = readme.read_text("utf-8", "replace") if README in bundle.manifest.files else ""
    found = json.loads((bundle.path / "certificate.json").read_bytes())
    sizes = [output.shape[-1] for output in bundle.manifest.outputs if output.name == GATES]
    return Card(bundle=bundle.name, text=text, certificate=proved(found), experts=next(iter(sizes), 0) or 0)


def proved(certificate: Any) -> Proved | None:
    """Return *certificate*, parsed JSON, in short; None where it has not the shape of one."""
    try:
        roots = certificate["roots"]
        return Proved(
            detached=certificate["detached"],
            removed=len(certificate["removed"]),
            bytes_removed=sum(entry["bytes"] for entry in certificate["removed"]),
            kept=len(certificate["kept"]),
            root=roots["any_batch"],
            onnx_root=roots["onnx"],
            operations=roots["operations"],
            images=certificate["images"],
            largest_difference=certificate["largest_difference"],
        )
    except (KeyError, TypeError, ValueError):
        return None
