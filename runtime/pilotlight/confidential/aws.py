"""AWS KMS: wrapping a content key at sealing time, and getting it back for a Nitro document."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, OAEP
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from pilotlight.confidential.key_release import KeyNotReleased, recipient_for
from pilotlight.confidential.recipients import AWS_KEY
from pilotlight.confidential.sealed_manifest import SealedManifest
from pilotlight.errors import ConfigError

Attest = Callable[[bytes], bytes]
"""From a public key (SubjectPublicKeyInfo) to the enclave's document that holds it."""
Decrypt = Callable[[str, bytes, bytes], bytes]
"""From the key's ARN, what it encrypted, and the document to the enveloped data."""


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


class AwsKms:
    """AWS KMS from inside an enclave: it encrypts what it decrypts for the key in the enclave's own document.

    Calls leave an enclave through a proxy on its parent; ``AWS_ENDPOINT_URL_KMS`` says where that listens.

    Source: AWS KMS API reference, Decrypt, ``Recipient``.
    """

    def __init__(self, attest: Attest | None = None, decrypt: Decrypt | None = None) -> None:
        """By default the evidence is that of ``/dev/nsm``, and boto3 asks KMS."""
        self._attest = attest or _nitro_document
        self._decrypt = decrypt or _decrypt_at_aws

    def release(self, sealed: SealedManifest) -> bytes:
        recipient = recipient_for(sealed, "aws")
        key = rsa.generate_private_key(65537, 2048)
        public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        try:
            wrapped = base64.b64decode(recipient.wrapped, validate=True)
        except ValueError as error:
            raise KeyNotReleased(f"the wrapped key of {recipient.id} is not base64") from error
        return open_enveloped(self._decrypt(recipient.id, wrapped, self._attest(public)), key)


def open_enveloped(content: bytes, key: RSAPrivateKey) -> bytes:
    """Return what is in a CMS EnvelopedData, of RSAES-OAEP with SHA-256 and AES-256-CBC.

    AES-CBC does not authenticate: the commitment in the sealed manifest does, when the key is used.

    Raises:
        KeyNotReleased: it is of another form, or for another key.
    """
    from asn1crypto import cms

    try:
        outer = cms.ContentInfo.load(content)
        if outer["content_type"].native != "enveloped_data":
            raise KeyNotReleased("AWS KMS answers with something else than enveloped data")
        enveloped = outer["content"]
        (info,) = enveloped["recipient_infos"]
        transported = info.chosen
        algorithm = transported["key_encryption_algorithm"]
        inner = enveloped["encrypted_content_info"]
        cipher = inner["content_encryption_algorithm"]
        if (algorithm["algorithm"].native, cipher["algorithm"].native) != ("rsaes_oaep", "aes256_cbc"):
            raise KeyNotReleased("AWS KMS answers with enveloped data of other algorithms")
        content_key = key.decrypt(transported["encrypted_key"].native, OAEP(MGF1(SHA256()), SHA256(), None))
        decryptor = Cipher(AES(content_key), CBC(cipher["parameters"].native)).decryptor()
        padded = decryptor.update(inner["encrypted_content"].native) + decryptor.finalize()
        unpadder = PKCS7(128).unpadder()
        return unpadder.update(padded) + unpadder.finalize()
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise KeyNotReleased("AWS KMS answers with something that is not encrypted for this enclave") from error


def _nitro_document(public_key: bytes) -> bytes:
    from pilotlight.confidential.sources import NSM, NitroSecurityModule

    return NitroSecurityModule(NSM, public_key).attest(secrets.token_bytes(64)).body


def _decrypt_at_aws(key_arn: str, wrapped: bytes, document: bytes) -> bytes:
    match = AWS_KEY.fullmatch(key_arn)
    if match is None:
        raise KeyNotReleased(f"{key_arn} is not the ARN of a key of AWS KMS")
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError as error:
        raise ConfigError("AWS KMS needs boto3: pip install boto3") from error
    try:
        answer = boto3.client("kms", region_name=match[1]).decrypt(
            KeyId=key_arn,
            CiphertextBlob=wrapped,
            Recipient={"KeyEncryptionAlgorithm": "RSAES_OAEP_SHA_256", "AttestationDocument": document},
        )
        sealed: bytes = answer["CiphertextForRecipient"]
    except (BotoCoreError, ClientError, KeyError) as error:
        raise KeyNotReleased(f"{key_arn}: AWS KMS does not release the key ({error})") from error
    return sealed
