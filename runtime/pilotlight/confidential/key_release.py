"""Where the key of a sealed artifact comes from: one interface, and ``[functions.NAME.unseal]`` which chooses.

=========  =========================================================================================================
release    what else is to be said
=========  =========================================================================================================
``file``   ``private_key``: an X25519 or RSA key in PEM; for development, as it lies where the artifact does
``kbs``    ``url`` of a key server that speaks the protocol of Trustee; the evidence is that of ``[confidential]``
``coco``   nothing: the guest of Confidential Containers has a service that attests and asks its key broker
``azure``  ``url`` of the attestation sidecar, and ``maa`` of Microsoft Azure Attestation
``aws``    nothing: AWS KMS answers to the key that is in the enclave's own document
=========  =========================================================================================================

``publisher`` is always needed: the public key, in PEM, whose signature on the sealed manifest counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from pilotlight.artifact import Artifact, Grant
from pilotlight.confidential.recipients import key_id, unwrap_rsa, unwrap_x25519
from pilotlight.confidential.sealed_contents import open_sealed
from pilotlight.confidential.sealed_manifest import (
    Recipient,
    SealedManifest,
    decode_sealed_manifest,
    digest_of,
    read_signed,
)
from pilotlight.config import NOT_CONFIDENTIAL, ConfidentialSettings
from pilotlight.errors import ConfigError, StartupError
from pilotlight.metering.signing import read_verifying_key


class KeyNotReleased(StartupError):
    """Whoever has the key of a sealed artifact does not give it to this process; the message says who, and why."""

    code = "key_not_released"


class KeySource(Protocol):
    """One way to a content key."""

    def release(self, sealed: SealedManifest) -> bytes:
        """Return the content key of an artifact. Raises ``KeyNotReleased``, or ``ConfigError``."""


class UnsealSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[functions.NAME.unseal]``."""

    publisher: str
    release: str
    private_key: str = ""
    url: str = ""
    maa: str = ""


@dataclass(frozen=True, slots=True)
class Unsealing:
    """How one function's artifact is opened."""

    publisher: Path
    source: KeySource

    @classmethod
    def parse(
        cls, table: dict[str, str], origin: str, confidential: ConfidentialSettings = NOT_CONFIDENTIAL
    ) -> Unsealing:
        """Read ``[functions.NAME.unseal]``; evidence comes from where ``confidential`` says.

        Raises:
            ConfigError: a key is unknown or missing.
        """
        try:
            settings = msgspec.convert(table, UnsealSettings)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{origin}: {error}") from error
        return cls(Path(settings.publisher), _source(settings, origin, confidential))

    def open(self, path: Path) -> Artifact:
        """Open a sealed artifact: first whose it is, then its key, then what is inside.

        Raises:
            ArtifactError: it is damaged, or not this publisher's.
            KeyNotReleased: the key is not given.
            ConfigError: a key file cannot be read.
        """
        raw = read_signed(path, read_verifying_key(self.publisher))
        sealed = decode_sealed_manifest(raw, path)
        return open_sealed(path, Grant(self.source.release(sealed), digest_of(raw)))


@dataclass(frozen=True, slots=True)
class KeyFile:
    """A private key on this machine."""

    path: Path

    def release(self, sealed: SealedManifest) -> bytes:
        from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            key = load_pem_private_key(self.path.read_bytes(), password=None)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read ({error.strerror})") from error
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{self.path}: holds no private key in PEM") from error
        if isinstance(key, X25519PrivateKey):
            recipient = recipient_for(sealed, "x25519", key_id(key.public_key()))
            return unwrap_x25519(recipient, key, bytes.fromhex(sealed.seal_id))
        if isinstance(key, RSAPrivateKey):
            return unwrap_rsa(recipient_for(sealed, "rsa", key_id(key.public_key())), key)
        raise ConfigError(f"{self.path}: is neither an X25519 nor an RSA key")


def recipient_for(sealed: SealedManifest, kind: str, name: str | None = None) -> Recipient:
    """Return the entry of one of an artifact's recipients.

    Raises:
        KeyNotReleased: it was not sealed for this one.
    """
    for recipient in sealed.recipients:
        if recipient.kind == kind and name in (None, recipient.id):
            return recipient
    known = ", ".join(f"{recipient.kind} {recipient.id}" for recipient in sealed.recipients)
    raise KeyNotReleased(
        f"the artifact is not sealed for {kind} {name or ''}".rstrip() + f", but for {known or 'nobody'}"
    )


def _source(settings: UnsealSettings, origin: str, confidential: ConfidentialSettings) -> KeySource:
    """Return the source that is named; each is loaded only where it is."""
    if settings.release == "file":
        return KeyFile(Path(_given(settings.private_key, "private_key", origin)))
    if settings.release == "kbs":
        from pilotlight.confidential.attester import open_source
        from pilotlight.confidential.kbs import KeyBroker

        return KeyBroker(_given(settings.url, "url", origin), open_source(confidential)[0])
    if settings.release == "coco":
        from pilotlight.confidential.kbs import GuestService

        return GuestService()
    if settings.release == "azure":
        from pilotlight.confidential.azure import SecureKeyRelease

        return SecureKeyRelease(_given(settings.url, "url", origin), _given(settings.maa, "maa", origin))
    if settings.release == "aws":
        from pilotlight.confidential.aws import AwsKms

        return AwsKms()
    raise ConfigError(f"{origin}.release is {settings.release!r}; expected file, kbs, coco, azure or aws")


def _given(value: str, name: str, origin: str) -> str:
    if not value:
        raise ConfigError(f"{origin}.{name} is missing")
    return value
