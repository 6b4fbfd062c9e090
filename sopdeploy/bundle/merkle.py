"""The hash that the Merkle roots of captured programs and of ONNX graphs are built from."""

import hashlib


def hash_parts(*parts: str | bytes | memoryview) -> str:
    """Compute the sha256 of *parts*, each preceded by its length, so that different lists never collide."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()
