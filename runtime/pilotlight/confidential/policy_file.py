"""What the policy files of the key server and of the proxy share: how they are read, and whom they trust."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Self

import msgspec
from msgspec import Meta

from pilotlight.confidential.appraisal import Kind, Roots
from pilotlight.confidential.pins import VENDORS
from pilotlight.errors import ConfigError

Digest = Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]


class PolicyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``trust``: roots beside the vendors', by kind."""

    trust: dict[Kind, list[str]] = {}

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises ConfigError where the file cannot be read or is no policy."""
        try:
            return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), cls)
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
