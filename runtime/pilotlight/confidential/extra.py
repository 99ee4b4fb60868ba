"""Whether what confidential inference needs is installed."""

from __future__ import annotations

import importlib.util

from pilotlight.errors import ConfigError

NEEDED = ("cryptography", "cbor2", "httpx", "joserfc", "pyhpke", "rfc8785")


def require_extra() -> None:
    """Raises ConfigError, with what to install, where a library is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"this needs {missing[0]}: pip install 'pilotlight[confidential]'")
