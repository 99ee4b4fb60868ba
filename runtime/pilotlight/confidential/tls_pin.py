"""TLS to one certificate and no other: the one whose key the other side's evidence holds."""

from __future__ import annotations

import hashlib
import socket
import ssl

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import load_der_x509_certificate

TIMEOUT_S = 10.0


def certificate_of(host: str, port: int) -> bytes:
    """Return the certificate (DER) that a server shows now. Nothing is sent to it, and nothing of it is believed.

    Raises:
        OSError: it cannot be reached, or speaks no TLS.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with (
        socket.create_connection((host, port), TIMEOUT_S) as connection,
        context.wrap_socket(connection, server_hostname=host) as secured,
    ):
        found = secured.getpeercert(binary_form=True)
    if found is None:
        raise OSError("the server shows no certificate")
    return found


def key_hash(certificate: bytes) -> bytes:
    """Return the SHA-256 of a certificate's SubjectPublicKeyInfo."""
    key = load_der_x509_certificate(certificate).public_key()
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


def pinned(certificate: bytes) -> ssl.SSLContext:
    """Return a context that accepts this certificate only, whoever signed it and whatever name it has."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=ssl.DER_cert_to_PEM_cert(certificate))
    return context
