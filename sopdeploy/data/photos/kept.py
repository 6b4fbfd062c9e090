"""Photos that a server has kept: what their names say, into whatever folder somebody moves them.

`ID-sample.jpg` belongs to the random sample of all photos, and `ID.jpg` was kept because the network
was not sure of it or a person reported its prediction. ID is the beginning of the SHA-256 of the file
that a client sent.

The sample decides in `compare` which of two bundles is better. A classifier on a frozen network is trained on
all of it, because the cross-validation has answered each photo without its fold, and the bundle records
these answers. Any other training leaves half of the sample out (`decides`).
"""

import hashlib
import re
from pathlib import Path, PurePath

from sopdeploy.errors import DataError

SAMPLED = "-sample"  # behind the ID
LABEL_CONFIG = "label-config.xml"  # in the folder of a server: the classes, for Label Studio
NOT_OURS = "not one of ours"  # the label of a photo that shows none of the classes
SAMPLE_FOLDER = "sample"  # of 0.3.0: photos of the sample that show none of the classes
ID_DIGITS = 32  # hexadecimal
PHOTO_SUFFIXES = (".jpg", ".png")

# Also of copies: ID-2, `ID (1)`, `ID copy`
_KEPT_STEM = re.compile(r"([0-9a-f]{32})(?:[-_ (].*)?")


def image_id(content: bytes) -> str:
    """Return the ID of an image by the *content* of its file, which names it in the folder of a server.

    Checkpoints and bundles record `Photo.file_hash` instead, as 0.1.0 did.
    """
    return hashlib.sha256(content).hexdigest()[:ID_DIGITS]


def kept_id(name: str) -> str:
    """Return the ID in *name*, the name of a kept photo, its copy or its record; "" for other files."""
    match = _KEPT_STEM.fullmatch(PurePath(name).stem)
    return match[1] if match else ""


def kept_names(identity: str, suffix: str) -> tuple[str, str]:
    """Return the names that a server gives the photo with the ID *identity*, outside of the sample and in it."""
    return f"{identity}{suffix}", f"{identity}{SAMPLED}{suffix}"


def is_record(name: str) -> bool:
    """Tell whether *name* is the name of the record that a server writes beside a photo."""
    return kept_id(name) != "" and PurePath(name).suffix == ".json"


def is_sampled(name: str) -> bool:
    """Tell whether *name* is the name of a photo of the random sample."""
    return kept_id(name) != "" and SAMPLED in PurePath(name).stem


def is_kept_as_unsure(name: str) -> bool:
    """Tell whether *name* is the name of a photo that a server kept outside of its random sample.

    Copies are like their originals.
    """
    is_kept = kept_id(name) != "" and PurePath(name).suffix in PHOTO_SUFFIXES
    return is_kept and not is_sampled(name)


def decides(name: str) -> bool:
    """Tell whether a training that answers no photo out of fold must not use the photo *name*.

    This is true for half of the random sample, which then decides in `compare`. The first 32 bits of the ID
    have put the photo into the sample, so the next 32 bits choose the half.
    """
    return is_sampled(name) and int(kept_id(name)[8:16], 16) % 2 == 0


def check_is_labelled(folder: Path) -> None:
    """Raise `DataError` if *folder* is the folder of a server, whose subfolders are predicted classes."""
    if (folder / LABEL_CONFIG).is_file():
        raise DataError(
            f"{folder}: a server keeps photos here, and its folders are predictions, not labels; "
            "look at the photos, and move them to photos/<class>/"
        )
