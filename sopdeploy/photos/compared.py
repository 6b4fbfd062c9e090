"""Shares of equal tiles of pairs of images, kept between runs beside the cached features.

Most of what a second `train` on the same folder would compute again is this comparison. The file
has a key of eight bytes per pair: a hash of both small images. A file that is damaged, or of
another version of the comparison, is not used.
"""

import hashlib
from contextlib import suppress
from importlib.resources import files

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
    # The shares that are known, sorted by key.
    key_P = _keys(small, pairs)
    photos = files("sopdeploy.photos")
    code = b"".join(photos.joinpath(name).read_bytes() for name in ("compared.py", "crops.py"))
    path = features_folder() / f"{hashlib.sha256(code).hexdigest()}.pairs"
    known = np.frombuffer(read_checked(path, MAX_PAIRS * _ROW.itemsize + 1000) or b"", _ROW)
    place_P = np.minimum(np.searchsorted(known["key"], key_P), max(len(known) - 1, 0))
    is_known_P = (
        known["key"][place_P] == key_P if len(known) else np.zeros(len(key_P), np.bool_)
    )

    shares = np.empty(len(key_P), np.float32)
    shares[is_known_P] = known["share"][place_P[is_known_P]]
    is_new_P = ~is_known_P
    if not is_new_P.any():
        return shares
    shares[is_new_P] = compare_pixels(small, pairs[:, is_new_P])

    # Those of this run come first: where there are too many, the others go.
    rows = np.empty(len(key_P), _ROW)
    rows["key"] = key_P
    rows["share"] = shares
    others = known[~np.isin(known["key"], key_P)]
    kept = np.concatenate([rows, others])[:MAX_PAIRS]
    kept = kept[np.unique(kept["key"], return_index=True)[1]]
    if path.is_absolute():  # the XDG specification ignores relative paths
        with suppress(OSError):
            write_checked(path, kept.tobytes())
    return shares


def _keys(small: NDArray[np.uint8], pairs: NDArray[np.intp]) -> NDArray[np.uint64]:
    """Hash each of the *pairs* (2, P) of *small* images (N, S, S), in its order."""
    digest_N = [hashlib.sha256(image.tobytes()).digest() for image in small]
    keys = [
        hashlib.blake2b(digest_N[one] + digest_N[other], digest_size=8).digest()
        for one, other in pairs.T
    ]
    return np.frombuffer(b"".join(keys), "<u8").astype(np.uint64)
