"""A server on somebody else's machine, as its client sees it: what it has to prove, and which of its keys count then.

artifacts = ["sha256:…"]                # what it may run; left out: any
labels = ["hardware"]                   # what its evidence has to be worth at least one of

[evidence]                              # an appraisal policy: kinds, claims, min_tcb, …
kinds = ["sev-snp"]
claims.measurement = ["…"]

[trust]                                 # roots beside the vendors', by kind
simulated = ["SHA-256 of the public key of the simulator's root"]
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from pilotlight.confidential.appraisal import Appraisal, Policy
from pilotlight.confidential.attested import appraise_attestation
from pilotlight.confidential.binding import NO_PART, NUM_NONCE_BYTES, Bindings
from pilotlight.confidential.policy_file import Digest, PolicyFile
from pilotlight.errors import PilotlightError
from pilotlight.tee import TeeLabel


class RemoteRefused(PilotlightError):
    """What the other side proves, or sends, is not what is asked of it: nothing is sent to it."""

    status = 502
    code = "remote_refused"


class RemotePolicy(PolicyFile, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole file."""

    evidence: Policy
    artifacts: frozenset[Digest] = frozenset()
    labels: frozenset[TeeLabel] = frozenset({TeeLabel.HARDWARE})


@dataclass(frozen=True, slots=True)
class Proven:
    """What a server's evidence has proven: these keys are its own, and this is its artifact."""

    bindings: Bindings
    appraisal: Appraisal

    @property
    def hpke_key(self) -> X25519PublicKey:
        """Raises RemoteRefused where it has none."""
        if self.bindings.hpke_key == NO_PART:
            raise RemoteRefused("the remote has no key for encrypted prompts: confidential.encrypted_prompts")
        return X25519PublicKey.from_public_bytes(self.bindings.hpke_key)

    @property
    def receipt_key(self) -> Ed25519PublicKey:
        """Raises RemoteRefused where it has none."""
        if self.bindings.receipt_key == NO_PART:
            raise RemoteRefused("the remote has no key for receipts: host.signing_key")
        return Ed25519PublicKey.from_public_bytes(self.bindings.receipt_key)

    @property
    def artifact_digest(self) -> str:
        return f"sha256:{self.bindings.manifest_digest.hex()}"


def fresh_nonce() -> bytes:
    return secrets.token_bytes(NUM_NONCE_BYTES)


def prove(content: bytes, nonce: bytes, policy: RemotePolicy, at: datetime) -> Proven:
    """Return what an answer of ``GET /attestation`` proves.

    Raises:
        EvidenceRefused: it proves too little, or is of another kind, machine, time or nonce.
        MalformedEvidence: it is none.
        RemoteRefused: it runs another artifact.
    """
    bindings, appraisal = appraise_attestation(content, nonce=nonce, policy=policy.evidence, at=at, roots=policy.roots)
    proven = Proven(bindings, appraisal.require(*sorted(policy.labels)))
    if policy.artifacts and proven.artifact_digest not in policy.artifacts:
        raise RemoteRefused(f"the remote runs the artifact {proven.artifact_digest}, which the policy does not name")
    return proven
