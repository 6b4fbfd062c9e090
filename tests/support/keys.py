"""Keys that sign bundles."""

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec


def write_key(path: Path) -> Path:
    """Write a private key to *path* and its public key to `path.pub`; return the path of the public key."""
    key, public = ec.generate_private_key(ec.SECP256R1()), path.with_name(f"{path.name}.pub")
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    of_public = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, of_public))
    return public
