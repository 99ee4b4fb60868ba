"""Encrypted prompts and receipts, where the settings ask for them; nothing is loaded for them otherwise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.types import ASGIApp

from pilotlight.api.attestation import Attester
from pilotlight.config import HostSettings, Settings
from pilotlight.errors import ConfigError
from pilotlight.function import UsageLedger
from pilotlight.metering.signing import Signer

if TYPE_CHECKING:
    from pilotlight.confidential.ehbp import ServerKey


class Encryption:
    """The key of this process, and what opens bodies with it."""

    def __init__(self, key: ServerKey, max_body_bytes: int, *, required: bool) -> None:
        self._key = key
        self._max_body_bytes = max_body_bytes
        self._required = required

    @property
    def public_key(self) -> bytes:
        return self._key.public.public_bytes_raw()

    def middleware(self, attester: Attester | None) -> Callable[[ASGIApp], ASGIApp]:
        """Return what goes around the endpoints. The attester is told whenever the key is renewed."""
        from pilotlight.api.encrypted_bodies import EncryptedBodies

        if attester is not None:
            self._key.on_renewal = lambda key: attester.take_hpke_key(key.public_bytes_raw())
        return partial(EncryptedBodies, key=self._key, max_body_bytes=self._max_body_bytes, required=self._required)


def open_encryption(settings: Settings) -> Encryption | None:
    """Make a key for encrypted bodies, where they are wanted.

    Raises:
        ConfigError: the extra is not installed, or answers would be written to a disk.
    """
    wanted = settings.confidential.encrypted_prompts
    if wanted == "off":
        return None
    if settings.host.response_store != HostSettings().response_store:
        raise ConfigError("host.response_store is a file, and answers to encrypted prompts are kept in memory only")
    from pilotlight.confidential.extra import require_extra

    require_extra()
    from pilotlight.confidential.ehbp import ServerKey

    return Encryption(ServerKey(), settings.host.max_body_bytes, required=wanted == "required")


def open_receipts(
    settings: Settings, signer: Signer | None, ledger: UsageLedger, attester: Attester | None
) -> Callable[[ASGIApp], ASGIApp] | None:
    """Return the middleware that makes receipts, where they are wanted.

    Raises:
        ConfigError: there is no key to sign them with, nowhere to write them, or the extra is not installed.
    """
    if not settings.confidential.receipts:
        return None
    if signer is None:
        raise ConfigError("confidential.receipts needs host.signing_key; make one with: pilotlight keys signing FILE")
    from pilotlight.confidential.extra import require_extra

    require_extra()
    from pilotlight.api.receipts import Receipts
    from pilotlight.confidential.issuer import Issuer
    from pilotlight.confidential.pins import VENDORS
    from pilotlight.confidential.receipt_files import ReceiptFiles

    directory = settings.confidential.receipts_dir
    files = ReceiptFiles(Path(directory).expanduser()) if directory else None
    issuer = Issuer(signer, ledger.get, attester, getattr(attester, "roots", VENDORS), files=files)
    return partial(Receipts, issuer=issuer)
