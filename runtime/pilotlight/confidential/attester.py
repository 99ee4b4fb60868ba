"""This process's own evidence: made by a source, bound to its keys, and appraised once at the start.

The word in the header of every answer is what that appraisal said. It is the process's own word: a client that wants to
know asks for evidence with a nonce of its own and appraises it itself (``attested.appraise_attestation``).
"""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from pilotlight.confidential.appraisal import Appraisal, Kind, Policy, Refused, Roots, to_wire
from pilotlight.confidential.binding import NO_PART, NUM_REPORT_DATA_BYTES, Bindings, report_data
from pilotlight.confidential.chain import fingerprint, load_pem
from pilotlight.confidential.pins import VENDORS
from pilotlight.confidential.simulator import Simulator
from pilotlight.confidential.sources import Completed, Source, detect
from pilotlight.confidential.verify import appraise
from pilotlight.config import ConfidentialSettings, Settings
from pilotlight.errors import ConfigError
from pilotlight.tee import Attestation, BindingsObject, TeeLabel

ANYTHING = Policy(
    kinds=frozenset(Kind), any_measurement=True, device=Policy(kinds=frozenset(Kind), any_measurement=True)
)
"""What runs here is for the client to judge; the question at a start is only whether anything proves anything."""


class Attester:
    """Makes evidence for whoever asks. ``keys`` are this process's; the manifest's digest comes with each call."""

    def __init__(self, source: Source, keys: Bindings, label: TeeLabel, roots: Roots = VENDORS) -> None:
        self.label = label
        self.roots = roots
        self._source = source
        self._keys = keys

    @classmethod
    def open(cls, settings: ConfidentialSettings, keys: Bindings) -> Attester:
        """Open the source that the settings name, and appraise what it gives.

        Raises:
            ConfigError: there is no such source here.
            EvidenceUnavailable: the source gives nothing.
        """
        source, roots = open_source(settings)
        return cls(source, keys, self_appraisal(source, roots, datetime.now(UTC)).label, roots)

    def take_hpke_key(self, key: bytes) -> None:
        """Bind evidence to another key of encrypted requests from now on."""
        self._keys = replace(self._keys, hpke_key=key)

    def attest(self, nonce: bytes, manifest_digest: bytes) -> Attestation:
        """Return fresh evidence that is bound to a nonce of 32 bytes; may block."""
        bindings = replace(self._keys, manifest_digest=manifest_digest)
        evidence = self._source.attest(report_data(nonce, bindings))
        on_wire = BindingsObject(
            bindings.hpke_key.hex(),
            bindings.tls_key_hash.hex(),
            bindings.receipt_key.hex(),
            bindings.manifest_digest.hex(),
        )
        return Attestation(self.label, nonce.hex(), on_wire, to_wire(evidence))


def bound_keys(settings: Settings, hpke_key: bytes) -> Bindings:
    """Return what evidence of a host is bound to besides the artifact.

    Raises:
        ConfigError: a key or a certificate that the settings name cannot be read.
    """
    return Bindings(
        hpke_key=hpke_key,
        tls_key_hash=_tls_key_hash(settings.confidential.tls_certificate),
        receipt_key=_receipt_key(settings.host.signing_key),
    )


def self_appraisal(source: Source, roots: Roots, at: datetime) -> Appraisal:
    """Appraise a source's evidence for a nonce that was made just now."""
    nonce = os.urandom(NUM_REPORT_DATA_BYTES)
    return appraise(source.attest(nonce), nonce=nonce, policy=ANYTHING, at=at, roots=roots)


def open_source(settings: ConfidentialSettings) -> tuple[Source, Roots]:
    """Open the source of evidence that the settings name, and whom to trust with it.

    Raises:
        ConfigError: there is no such source here.
    """
    source, roots = _bare_source(settings)
    files = {str(name): Path(path).expanduser() for name, path in settings.collateral.items()}
    return Completed(source, files) if files else source, roots


def _bare_source(settings: ConfidentialSettings) -> tuple[Source, Roots]:
    if settings.evidence == "none":
        raise ConfigError("this needs evidence, and confidential.evidence is 'none'")
    if settings.evidence == "simulator":
        simulator = Simulator.open(Path(settings.simulator).expanduser())
        return simulator, VENDORS.trusting(Kind.SIMULATED, simulator.root_fingerprint)
    source = detect(_certificates(settings.certificates))
    if source is None:
        raise ConfigError(
            "confidential.evidence is 'hardware', and this machine has none of: configfs-tsm, /dev/sev-guest, /dev/nsm"
        )
    return source, VENDORS


def _certificates(path: str) -> bytes:
    return _content(path, "confidential.certificates") if path else b""


def _tls_key_hash(path: str) -> bytes:
    if not path:
        return NO_PART
    try:
        return bytes.fromhex(fingerprint(load_pem(_content(path, "confidential.tls_certificate"))[0]))
    except Refused as error:
        raise ConfigError(f"confidential.tls_certificate is {path!r}: holds no certificate") from error


def _receipt_key(path: str) -> bytes:
    """Return the public half of the key that signs records."""
    if not path:
        return NO_PART
    try:
        key = load_pem_private_key(_content(path, "host.signing_key"), password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: holds no key ({error})") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path}: is not an Ed25519 key")
    return key.public_key().public_bytes_raw()


def _content(path: str, setting: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting} is {path!r}: cannot be read ({error.strerror})") from error
