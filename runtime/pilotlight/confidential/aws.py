"""AWS KMS: wrapping a content key at sealing time, and getting it back for a Nitro document."""

from __future__ import annotations

from pilotlight.confidential.recipients import AWS_KEY
from pilotlight.errors import ConfigError


def encrypt_at_aws(key_arn: str, content_key: bytes) -> bytes:
    """Return a content key as KMS encrypted it, with the credentials that the environment has.

    Raises:
        ConfigError: boto3 is not installed, or KMS refuses.
    """
    match = AWS_KEY.fullmatch(key_arn)
    assert match is not None
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError as error:
        raise ConfigError("AWS KMS needs boto3: pip install boto3") from error
    try:
        answer = boto3.client("kms", region_name=match[1]).encrypt(KeyId=key_arn, Plaintext=content_key)
    except (BotoCoreError, ClientError) as error:
        raise ConfigError(f"{key_arn}: AWS KMS does not encrypt the key ({error})") from error
    blob: bytes = answer["CiphertextBlob"]
    return blob
