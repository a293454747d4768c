"""An optional Ed25519 signature over a bundle's manifest, and thereby over every file of it.

    NAME.cxrgaze/manifest.sig    64 bytes over the bytes of manifest.json

A digest shows accidents, a signature shows attacks: whoever can rewrite a bundle can rewrite its
digests, but not sign them. Keys are PEM files: `openssl genpkey -algorithm ed25519 -out key.pem`,
`openssl pkey -in key.pem -pubout -out public.pem`. Ed25519 is RFC 8032; the library `cryptography`
computes it (extra `sign`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cxrgaze.bundles.bundle import MANIFEST, SIGNATURE, Bundle
from cxrgaze.errors import IntegrityError, UsageError
from cxrgaze.files import read_regular, write_atomic

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_KEY_LIMIT = 1 << 16
_LENGTH = 64


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """The key to sign with.

    Raises:
        UsageError: `path` is no Ed25519 private key without a password in PEM.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_key(path), password=None)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"{path} is no private key in PEM without a password; make one with: openssl genpkey "
            "-algorithm ed25519 -out key.pem"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{path} is no Ed25519 key; openssl genpkey -algorithm ed25519")
    return key


def sign(folder: Path, key: Ed25519PrivateKey) -> None:
    """Write the signature of the manifest in `folder`."""
    write_atomic(folder / SIGNATURE, key.sign((folder / MANIFEST).read_bytes()))


def require_signature(bundle: Bundle, public_key: Path) -> None:
    """Refuse a bundle that the owner of `public_key` has not signed as it is.

    Raises:
        UsageError: `public_key` is no Ed25519 public key in PEM.
        IntegrityError: no signature, or one of another manifest or by another key.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_key(public_key))
    except ValueError as error:
        raise UsageError(f"{public_key} is no public key in PEM") from error
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"{public_key} is no Ed25519 public key")
    path = bundle.path / SIGNATURE
    try:
        signature = read_regular(path, _LENGTH)
    except OSError as error:
        raise IntegrityError(
            f"{bundle.path} is not signed, and a signature was asked for; export with --sign KEY"
        ) from error
    try:
        # The manifest was read once; its canonical rendering is what was read (Bundle.open).
        key.verify(signature, bundle.manifest.rendered())
    except InvalidSignature as error:
        raise IntegrityError(
            f"{path} is not the signature of this manifest by the owner of {public_key}"
        ) from error


def _key(path: Path) -> bytes:
    try:
        return read_regular(path, _KEY_LIMIT)
    except OSError as error:
        raise UsageError(f"key {path} cannot be read: {error.strerror}") from error
