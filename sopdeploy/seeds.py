"""Randomness as a function of where it is used, not as a state that has to be kept.

Every random choice of a run is drawn from `derive_seed(seed, what for, epoch, step or sample)`. A run that is
stopped anywhere and resumed therefore makes the same choices, with any number of loader processes.
"""

import hashlib


def derive_seed(*position: int | str) -> int:
    """Return 63 random-looking bits for *position*, the same on every machine and version."""
    text = "\x1f".join(str(part) for part in position)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
