"""The policy file of the key server: which resource goes to whom.

    [trust]
    simulated = ["SHA-256 of the public key of the simulator's root"]     # nothing but the vendors' roots without it

    [[release]]
    resource = "default/key/demo"
    artifacts = ["sha256:…"]               # the requester's artifact; left out: any
    labels = ["hardware"]                  # what its evidence has to be worth at least one of

    [release.evidence]                     # an appraisal policy: kinds, claims, min_tcb, …
    kinds = ["sev-snp"]
    claims.measurement = ["…"]

A resource that no rule names is never given. The first rule whose ``resource`` matches decides.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import msgspec
from msgspec import Meta

from pilotlight.confidential.appraisal import Appraisal, Evidence, EvidenceRefused, Policy, Problem, Reason
from pilotlight.confidential.appraisal import refusal as refused
from pilotlight.confidential.policy_file import Digest, PolicyFile
from pilotlight.confidential.verify import appraise
from pilotlight.tee import TeeLabel


class Release(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One rule."""

    resource: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*){2}\Z")]
    evidence: Policy
    artifacts: frozenset[Digest] = frozenset()
    labels: frozenset[TeeLabel] = frozenset({TeeLabel.HARDWARE})


class KeyPolicy(PolicyFile, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole file."""

    release: list[Release]

    def decide(
        self, resource: str, evidence: Evidence, report_data: bytes, artifact: str | None, at: datetime
    ) -> Appraisal:
        """Return the appraisal under which a resource is given.

        Raises:
            EvidenceRefused: it is not.
        """
        rule = next((rule for rule in self.release if rule.resource == resource), None)
        if rule is None:
            raise EvidenceRefused(refused(evidence, Reason(Problem.CLAIM, f"no rule gives {resource}")))
        appraisal = appraise(evidence, nonce=report_data, policy=rule.evidence, at=at, roots=self.roots)
        appraisal.require(*sorted(rule.labels))
        if rule.artifacts and artifact not in rule.artifacts:
            reason = Reason(Problem.CLAIM, f"the artifact is {artifact or 'not named'}")
            raise EvidenceRefused(refused(evidence, reason))
        return appraisal

    def outcomes(
        self, evidence: Evidence, report_data: bytes, artifact: str | None, at: datetime
    ) -> dict[str, Appraisal]:
        """Return what ``decide`` comes to for each resource that a rule names; a refusal is an appraisal, too."""
        found: dict[str, Appraisal] = {}
        for resource in {rule.resource for rule in self.release}:
            try:
                found[resource] = self.decide(resource, evidence, report_data, artifact, at)
            except EvidenceRefused as refusal:
                found[resource] = refusal.appraisal
        return found
