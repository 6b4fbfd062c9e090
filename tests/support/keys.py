"""Keys, and bundles that are signed with them."""

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from model_signing import signing

from sopdeploy.bundle.signing import signature_path


def write_key(path: Path) -> Path:
    """Write a private key to *path* and its public key to `path.pub`; return the path of the public key."""
    key = ec.generate_private_key(ec.SECP256R1())
    public = path.with_name(f"{path.name}.pub")
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


def sign(bundle: Path, key: Path) -> Path:
    """Sign *bundle* as `model_signing sign key` does, beside it; return the path of the signature."""
    path = signature_path(bundle)
    signing.Config().use_elliptic_key_signer(private_key=key).sign(bundle, path)
    return path
