"""Azure Secure Key Release through Microsoft's sidecar, which attests the guest and asks the vault.

The content key is wrapped for an RSA key that the vault releases to evidence its own policy accepts. The sidecar runs
in the same guest, and hands the released key over on the guest's own loopback.

Source: microsoft/confidential-sidecar-containers, cmd/skr: ``POST key/release``.
"""

from __future__ import annotations

import re
from typing import Any

import httpx
import msgspec
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from joserfc.errors import JoseError
from joserfc.jwk import RSAKey

from pilotlight.confidential.key_release import KeyNotReleased, recipient_for
from pilotlight.confidential.recipients import unwrap_rsa
from pilotlight.confidential.sealed_manifest import SealedManifest

TIMEOUT_S = 60.0
KEY_URL = re.compile(r"https://([a-z0-9.-]+)/keys/([A-Za-z0-9-]+)(?:/[0-9a-f]+)?")


class SecureKeyRelease:
    """One sidecar."""

    def __init__(self, url: str, maa: str, client: httpx.Client | None = None) -> None:
        self._url = url.rstrip("/")
        self._maa = maa.removeprefix("https://").rstrip("/")
        self._client = client or httpx.Client(timeout=TIMEOUT_S, follow_redirects=False)

    def release(self, sealed: SealedManifest) -> bytes:
        recipient = recipient_for(sealed, "azure")
        match = KEY_URL.fullmatch(recipient.id)
        if match is None:
            raise KeyNotReleased(f"{recipient.id} is not the URL of a key in a vault")
        asked = {"maa_endpoint": self._maa, "akv_endpoint": match[1], "kid": match[2]}
        return unwrap_rsa(recipient, self._released(asked))

    def _released(self, asked: dict[str, str]) -> RSAPrivateKey:
        try:
            response = self._client.post(f"{self._url}/key/release", json=asked)
        except httpx.HTTPError as error:
            raise KeyNotReleased(f"{self._url} cannot be reached ({type(error).__name__})") from error
        if response.status_code != httpx.codes.OK:
            raise KeyNotReleased(f"{self._url} refuses: {response.text[:300]} (status {response.status_code})")
        try:
            answer = msgspec.json.decode(response.content, type=dict[str, Any])
            found = answer["key"]
            jwk = msgspec.json.decode(found, type=dict[str, Any]) if isinstance(found, str) else found
            key = RSAKey.import_key(jwk).private_key
        except (msgspec.MsgspecError, UnicodeDecodeError, JoseError, KeyError, ValueError, TypeError) as error:
            raise KeyNotReleased(f"{self._url} answers with no key") from error
        if not isinstance(key, RSAPrivateKey):
            raise KeyNotReleased(f"{self._url} answers with no private key")
        return key
