"""Shares of equal tiles of pairs of images, kept between runs beside the cached features.

Most of what a second `train` on the same folder would compute again is this comparison. The file
has a key of eight bytes per pair: a hash of both small images. A file that is damaged, or of
another version of the comparison, is not used.
"""

import hashlib
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sopdeploy.files import features_folder, read_checked, write_checked
from sopdeploy.photos.crops import compare_pixels

MAX_PAIRS = 500_000  # that are kept, 6 MB
_ROW = np.dtype([("key", "<u8"), ("share", "<f4")])


def compare_new(small: NDArray[np.uint8], pairs: NDArray[np.intp]) -> NDArray[np.float32]:
    """Return what `compare_pixels` returns, (P,); only pairs that no run has compared are computed.

    Without a cache folder that can be read and written, all are computed.
    """
    rows_P = np.empty(pairs.shape[1], _ROW)
    rows_P["key"] = _keys(small, pairs)

    # Shares that earlier runs computed. Their rows are sorted by key.
    path = _pairs_file()
    known = np.frombuffer(read_checked(path, MAX_PAIRS * _ROW.itemsize + 1000) or b"", _ROW)
    is_known_P = np.isin(rows_P["key"], known["key"])
    places = np.searchsorted(known["key"], rows_P["key"][is_known_P])
    rows_P["share"][is_known_P] = known["share"][places]
    if is_known_P.all():
        return rows_P["share"]

    rows_P["share"][~is_known_P] = compare_pixels(small, pairs[:, ~is_known_P])

    # Keep the pairs of this run, and others as long as there is room; again sorted, each key once.
    others = known[~np.isin(known["key"], rows_P["key"])]
    kept = np.concatenate([rows_P, others])[:MAX_PAIRS]
    kept = kept[np.unique(kept["key"], return_index=True)[1]]
    if path.is_absolute():  # the XDG specification ignores relative paths
        with suppress(OSError):
            write_checked(path, kept.tobytes())
    return rows_P["share"]


def _pairs_file() -> Path:
    """Return the file of compared pairs, which has the hash of the code of the comparison as its name."""
    photos = files("sopdeploy.photos")
    code = b"".join(photos.joinpath(name).read_bytes() for name in ("compared.py", "crops.py"))
    return features_folder() / f"{hashlib.sha256(code).hexdigest()}.pairs"


def _keys(small: NDArray[np.uint8], pairs: NDArray[np.intp]) -> NDArray[np.uint64]:
    """Hash each of the *pairs* (2, P) of *small* images (N, S, S), in its order."""
    digest_N = [hashlib.sha256(image.tobytes()).digest() for image in small]
    keys = [
        hashlib.blake2b(digest_N[one] + digest_N[other], digest_size=8).digest()
        for one, other in pairs.T
    ]
    return np.frombuffer(b"".join(keys), "<u8").astype(np.uint64)
