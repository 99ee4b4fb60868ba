"""Who gets the content key of a sealed artifact: reading ``--recipient``, wrapping for it, and unwrapping.

Source: RFC 9180 for X25519 (HPKE base mode), RFC 8017 for RSA (OAEP with SHA-256).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pilotlight.confidential.hpke import open_once, seal_once
from pilotlight.confidential.sealed_manifest import Recipient
from pilotlight.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.padding import AsymmetricPadding
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

KBS_URI = re.compile(
    r"kbs:///([A-Za-z0-9_-][A-Za-z0-9._-]*)/([A-Za-z0-9_-][A-Za-z0-9._-]*)/([A-Za-z0-9_-][A-Za-z0-9._-]*)"
)
AWS_KEY = re.compile(r"arn:aws[a-z-]*:kms:([a-z0-9-]+):\d{12}:(key|alias)/[A-Za-z0-9/_-]+")
INFO = b"pilotlight sealed content key v1"

EncryptAtAws = Callable[[str, bytes], bytes]


def recipient_of(text: str, content_key: bytes, seal_id: bytes, encrypt_at_aws: EncryptAtAws) -> Recipient:
    """Return the entry of one ``--recipient``, with the key wrapped for it where that is how it gets it.

    ``kbs:///REPOSITORY/TYPE/TAG``, an ARN of AWS KMS, ``https://VAULT/keys/NAME/VERSION=PUBLIC_KEY.pem``, or the file
    of an X25519 or RSA public key.

    Raises:
        ConfigError: it is none of these.
    """
    if text.startswith("kbs:"):
        if not KBS_URI.fullmatch(text):
            raise ConfigError(f"{text}: expected kbs:///REPOSITORY/TYPE/TAG")
        return Recipient("kbs", text)
    if text.startswith("arn:"):
        if not AWS_KEY.fullmatch(text):
            raise ConfigError(f"{text}: expected the ARN of a key of AWS KMS")
        return Recipient("aws", text, _encoded(encrypt_at_aws(text, content_key)))
    if text.startswith("https://"):
        url, separator, file = text.partition("=")
        if not separator:
            raise ConfigError(f"{text}: expected https://VAULT/keys/NAME/VERSION=PUBLIC_KEY.pem")
        return Recipient("azure", url, _encoded(_wrap_rsa(_rsa_key(Path(file)), content_key)))
    return _for_key_file(Path(text), content_key, seal_id)


def unwrap_x25519(recipient: Recipient, key: X25519PrivateKey, seal_id: bytes) -> bytes:
    """Return the content key.

    Raises:
        ConfigError: it was wrapped for another key, or altered.
    """
    wrapped = _decoded(recipient)
    try:
        return open_once(key, INFO + seal_id, wrapped)
    except ValueError as error:
        raise ConfigError("the content key cannot be unwrapped with this private key") from error


def unwrap_rsa(recipient: Recipient, key: RSAPrivateKey) -> bytes:
    """Return the content key.

    Raises:
        ConfigError: it was wrapped for another key, or altered.
    """
    try:
        return key.decrypt(_decoded(recipient), _oaep())
    except ValueError as error:
        raise ConfigError("the content key cannot be unwrapped with this private key") from error


def key_id(key: X25519PublicKey | RSAPublicKey) -> str:
    """Return a short name of a public key."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()[:16]


def make_recipient_key(path: Path) -> Path:
    """Write a new X25519 private key, which only its owner may read, and the public one beside it, which is returned.

    Raises:
        ConfigError: there is a file already, or it cannot be written.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    from pilotlight.metering.signing import write_key_pair

    return write_key_pair(path, X25519PrivateKey.generate())


def _for_key_file(path: Path, content_key: bytes, seal_id: bytes) -> Recipient:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

    key = _public_key(path)
    if isinstance(key, X25519PublicKey):
        return Recipient("x25519", key_id(key), _encoded(seal_once(key, INFO + seal_id, content_key)))
    if isinstance(key, RSAPublicKey):
        return Recipient("rsa", key_id(key), _encoded(_wrap_rsa(key, content_key)))
    raise ConfigError(f"{path}: is neither an X25519 nor an RSA public key")


def _rsa_key(path: Path) -> RSAPublicKey:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    key = _public_key(path)
    if not isinstance(key, RSAPublicKey):
        raise ConfigError(f"{path}: is not an RSA public key")
    return key


def _wrap_rsa(key: RSAPublicKey, content_key: bytes) -> bytes:
    if key.key_size < 2048:
        raise ConfigError(f"an RSA key of {key.key_size} bits is too short")
    return key.encrypt(content_key, _oaep())


def _oaep() -> AsymmetricPadding:
    from cryptography.hazmat.primitives.asymmetric.padding import MGF1, OAEP
    from cryptography.hazmat.primitives.hashes import SHA256

    return OAEP(MGF1(SHA256()), SHA256(), None)


def _public_key(path: Path) -> object:
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        return load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: holds no public key in PEM") from error


def _encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _decoded(recipient: Recipient) -> bytes:
    try:
        return base64.b64decode(recipient.wrapped, validate=True)
    except ValueError as error:
        raise ConfigError(f"the wrapped key of {recipient.id} is not base64") from error
