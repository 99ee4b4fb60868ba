"""Signed records: receipts that anybody who has the public key can verify, without a server.

A receipt is a JSON Web Signature in its compact form, and its payload is the record as the ledger holds it. The ledger
keeps header and signature. Source: RFC 7515, and RFC 8037 for Ed25519.
"""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from pilotlight.errors import ConfigError, PilotlightError
from pilotlight.metering.record import UsageRecord

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey


T = TypeVar("T")


class NotAReceipt(PilotlightError):
    """A receipt is malformed, was altered, or was signed with another key."""


class Signer:
    """Signs records with one private key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        header = {"alg": "EdDSA", "kid": key_fingerprint(key.public_key()), "typ": "JWT"}
        self._header = _encoded(msgspec.json.encode(header))

    @classmethod
    def from_file(cls, path: Path) -> Signer:
        """Read a private key.

        Raises:
            ConfigError: cryptography is not installed, or there is no Ed25519 key.
        """
        return cls(read_signing_key(path))

    def sign_bytes(self, content: bytes) -> bytes:
        """Return the bare signature of something that has a form of its own."""
        return self._key.sign(content)

    def sign(self, record: str) -> str:
        """Return header and signature of a record, with a dot between them."""
        signed = f"{self._header}.{_encoded(record.encode())}"
        return f"{self._header}.{_encoded(self._key.sign(signed.encode()))}"


class Verifier:
    """Verifies receipts with one public key."""

    def __init__(self, key: Ed25519PublicKey) -> None:
        self._key = key

    @classmethod
    def from_file(cls, path: Path) -> Verifier:
        """Read a public key.

        Raises:
            ConfigError: cryptography is not installed, or there is no Ed25519 key.
        """
        return cls(read_verifying_key(path))

    def verify(self, receipt: str) -> UsageRecord:
        """Return the record of a receipt.

        Raises:
            NotAReceipt: it is malformed, was altered, or was signed with another key.
        """
        return self.verify_content(receipt, UsageRecord)

    def verify_content(self, receipt: str, kind: type[T]) -> T:
        """Return what was signed, which has to be of this kind.

        Raises:
            NotAReceipt: it is malformed, was altered, or was signed with another key.
        """
        from cryptography.exceptions import InvalidSignature

        try:
            header, payload, signature = receipt.split(".")
            algorithm = msgspec.json.decode(_decoded(header))["alg"]
            self._key.verify(_decoded(signature), f"{header}.{payload}".encode())
            record = msgspec.json.decode(_decoded(payload), type=kind)
        except InvalidSignature as error:
            raise NotAReceipt("was altered, or signed with another key") from error
        except (ValueError, KeyError, TypeError, RecursionError, msgspec.MsgspecError) as error:
            raise NotAReceipt("is not a receipt") from error
        if algorithm != "EdDSA":
            raise NotAReceipt(f"is signed by {algorithm!r}, not by EdDSA")
        return record


def read_signing_key(path: Path) -> Ed25519PrivateKey:
    """Read a private key.

    Raises:
        ConfigError: cryptography is not installed, or there is no Ed25519 key.
    """
    _require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = _read(path, lambda content: load_pem_private_key(content, password=None))
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path}: is not an Ed25519 key")
    return key


def read_verifying_key(path: Path) -> Ed25519PublicKey:
    """Read a public key.

    Raises:
        ConfigError: cryptography is not installed, or there is no Ed25519 key.
    """
    _require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key = _read(path, load_pem_public_key)
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path}: is not an Ed25519 public key")
    return key


def receipt(record: str, signature: str) -> str:
    """Return the receipt of a record, from what a ledger keeps."""
    header, _, value = signature.partition(".")
    return f"{header}.{_encoded(record.encode())}.{value}"


def make_signing_key(path: Path) -> Path:
    """Write a new private key, which only its owner may read, and the public one beside it; return where that is.

    Raises:
        ConfigError: cryptography is not installed, there is a file already, or it cannot be written.
    """
    _require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return write_key_pair(path, Ed25519PrivateKey.generate())


def write_key_pair(path: Path, key: Ed25519PrivateKey | X25519PrivateKey) -> Path:
    """Write a private key, which only its owner may read, and the public one beside it; return where that is.

    Raises:
        ConfigError: there is a file already, or it cannot be written.
    """
    from cryptography.hazmat.primitives import serialization as form

    private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    public_path = path.with_name(f"{path.name}.pub")
    try:
        write_private(path, private)
        public_path.write_bytes(public)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error
    return public_path


def write_private(path: Path, content: bytes) -> None:
    """Write a new file that only its owner may read.

    Raises:
        OSError: there is one already, or it cannot be written.
    """
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def key_fingerprint(key: Ed25519PublicKey) -> str:
    """Return a short name of a public key."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def _read(path: Path, load: object) -> object:
    _require_cryptography()
    assert callable(load)
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: holds no key ({error})") from error


def _require_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise ConfigError("signing needs cryptography: pip install 'pilotlight[signing]'") from error


def _encoded(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def _decoded(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
