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

import tomllib
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from pilotlight.confidential.appraisal import Appraisal, Evidence, EvidenceRefused, Kind, Policy, Problem, Reason, Roots
from pilotlight.confidential.appraisal import refusal as refused
from pilotlight.confidential.pins import VENDORS
from pilotlight.confidential.verify import appraise
from pilotlight.errors import ConfigError
from pilotlight.tee import TeeLabel

Digest = Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]


class Release(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One rule."""

    resource: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*){2}\Z")]
    evidence: Policy
    artifacts: frozenset[Digest] = frozenset()
    labels: frozenset[TeeLabel] = frozenset({TeeLabel.HARDWARE})


class KeyPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    release: list[Release]
    trust: dict[Kind, list[str]] = {}

    @classmethod
    def read(cls, path: Path) -> KeyPolicy:
        """Raises ConfigError where the file cannot be read or is no policy."""
        try:
            content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
            return msgspec.convert(content, cls)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
            raise ConfigError(f"{path}: is not a policy ({error})") from error

    @property
    def roots(self) -> Roots:
        roots = VENDORS
        for kind, fingerprints in self.trust.items():
            roots = roots.trusting(kind, *fingerprints)
        return roots

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
