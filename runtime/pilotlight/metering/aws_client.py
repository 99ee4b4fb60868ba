"""How AWS is reached: boto3, with its usual settings and short waits."""

from __future__ import annotations

from typing import Any

from pilotlight.errors import ConfigError
from pilotlight.metering.database import DYNAMODB_SCHEME

CONNECT_TIMEOUT_S = 2
READ_TIMEOUT_S = 5


def new_client(service: str, max_connections: int = 10) -> Any:
    """Return a client of an AWS service.

    Raises:
        ConfigError: boto3 is not installed, or not told enough.
    """
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise ConfigError(f"{service} needs boto3: pip install 'pilotlight[lambda]'") from error
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        max_pool_connections=max_connections,
        retries={"mode": "standard", "total_max_attempts": 3},
    )
    try:
        return boto3.client(service, config=config)
    except BotoCoreError as error:
        raise ConfigError(f"{service} cannot be reached ({error})") from error


def table_of(url: str) -> str:
    """Return the table that ``dynamodb://TABLE`` names."""
    return url.removeprefix(DYNAMODB_SCHEME)
