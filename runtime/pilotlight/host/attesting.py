"""What proves where this host runs: nothing is loaded for it unless the settings ask."""

from __future__ import annotations

from pilotlight.api.attestation import Attester
from pilotlight.config import Settings
from pilotlight.errors import ConfigError
from pilotlight.tee import TeeLabel, require_hardware

NO_HPKE_KEY = bytes(32)


def open_attester(settings: Settings, hpke_key: bytes = NO_HPKE_KEY) -> Attester | None:
    """Open the source of evidence, bound to the keys of this host.

    Raises:
        ConfigError: there is none, the extra is not installed, or hardware is required and this is none.
        EvidenceUnavailable: the source gives nothing.
    """
    confidential = settings.confidential
    if confidential.evidence == "none":
        require_hardware(confidential.require_tee, TeeLabel.NONE)
        return None
    try:
        from pilotlight.confidential import attester
    except ImportError as error:
        raise ConfigError(f"evidence needs {error.name}: pip install 'pilotlight[confidential]'") from error
    opened = attester.Attester.open(confidential, attester.bound_keys(settings, hpke_key))
    require_hardware(confidential.require_tee, opened.label)
    return opened
