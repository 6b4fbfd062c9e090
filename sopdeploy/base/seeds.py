"""Random seeds.

Every random choice of a run uses `derive_seed(seed, purpose, epoch, step or sample)` instead of
a generator state that must be saved. A resumed run therefore makes the same choices as an
uninterrupted one, with any number of loader processes.
"""

import hashlib


def derive_seed(*keys: int | str) -> int:
    """Hash *keys* to a 63-bit seed that is the same on every machine and in every version."""
    text = "\x1f".join(str(key) for key in keys)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
