"""HPKE with X25519, HKDF-SHA256 and AES-256-GCM, base mode: the one suite that we use.

pyhpke does it, since cryptography's own HPKE has no export. Source: RFC 9180.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyhpke import AEADId, CipherSuite, KDFId, KEMId, KEMKey
from pyhpke.exceptions import PyHPKEError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from pyhpke import ContextInterface as Context

NUM_KEM_BYTES = 32
SUITE = CipherSuite.new(KEMId.DHKEM_X25519_HKDF_SHA256, KDFId.HKDF_SHA256, AEADId.AES256_GCM)


class HpkeError(ValueError):
    """What came cannot be opened with this key, or is no encapsulated key at all."""


def sender(key: X25519PublicKey, info: bytes) -> tuple[bytes, Context]:
    """Return an encapsulated key and the context that seals what goes with it.

    Raises:
        HpkeError: the public key is none.
    """
    try:
        enc, context = SUITE.create_sender_context(KEMKey.from_pyca_cryptography_key(key), info=info)
    except (PyHPKEError, ValueError) as error:
        raise HpkeError("cannot be sealed for this key") from error
    return enc, context


def recipient(enc: bytes, key: X25519PrivateKey, info: bytes) -> Context:
    """Return the context that opens what goes with an encapsulated key.

    Raises:
        HpkeError: it is not an encapsulated key.
    """
    if len(enc) != NUM_KEM_BYTES:
        raise HpkeError("the encapsulated key has another length")
    try:
        return SUITE.create_recipient_context(enc, KEMKey.from_pyca_cryptography_key(key), info=info)
    except (PyHPKEError, ValueError) as error:
        raise HpkeError("is not an encapsulated key") from error


def open_in(context: Context, sealed: bytes) -> bytes:
    """Open the next message of a context.

    Raises:
        HpkeError: it was altered, or is another one.
    """
    try:
        opened: bytes = context.open(sealed)
    except (PyHPKEError, ValueError) as error:
        raise HpkeError("was altered, or sealed for another key") from error
    return opened


def seal_once(key: X25519PublicKey, info: bytes, text: bytes) -> bytes:
    """Return one message for a key: the encapsulated key and what it seals."""
    enc, context = sender(key, info)
    sealed: bytes = context.seal(text)
    return enc + sealed


def open_once(key: X25519PrivateKey, info: bytes, message: bytes) -> bytes:
    """Open what ``seal_once`` made.

    Raises:
        HpkeError: it was altered, or sealed for another key.
    """
    return open_in(recipient(message[:NUM_KEM_BYTES], key, info), message[NUM_KEM_BYTES:])
