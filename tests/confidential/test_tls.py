"""TLS to the certificate in the evidence: another one is noticed before anything is sent."""

from __future__ import annotations

import asyncio
import datetime
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from starlette.types import Receive, Scope, Send

from pilotlight.confidential import tls_pin
from pilotlight.confidential.appraisal import Appraisal, Kind
from pilotlight.confidential.binding import Bindings
from pilotlight.confidential.proxy import client_for
from pilotlight.confidential.remote import Proven, RemoteRefused
from pilotlight.tee import TeeLabel


def certificate(directory: Path, name: str) -> tuple[Path, Path, bytes]:
    """Write a self-signed certificate; return it, its key, and the hash of its public key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(subject_name=subject, issuer_name=subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, SHA256())
    )
    paths = directory / f"{name}.pem", directory / f"{name}.key"
    paths[0].write_bytes(made.public_bytes(Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return *paths, tls_pin.key_hash(made.public_bytes(Encoding.DER))


async def _app(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


@contextmanager
def tls_server(chain: Path, key: Path, port: int = 0) -> Iterator[str]:
    server = uvicorn.Server(
        uvicorn.Config(_app, port=port, log_config=None, lifespan="off", ssl_certfile=chain, ssl_keyfile=key)
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        yield f"https://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(300)


def proven(key_hash: bytes) -> Proven:
    appraisal = Appraisal(True, TeeLabel.SIMULATED, Kind.SIMULATED, (), {}, "")
    return Proven(Bindings(tls_key_hash=key_hash), appraisal)


async def _get(client: httpx.AsyncClient, url: str) -> bytes:
    async with client:
        return (await client.get(url)).content


def test_the_certificate_in_the_evidence_is_spoken_to(tmp_path: Path) -> None:
    chain, key, key_hash = certificate(tmp_path, "replica")
    with tls_server(chain, key) as url:
        assert asyncio.run(_get(client_for(httpx.URL(url), proven(key_hash)), url)) == b"hello"


@pytest.mark.parametrize("key_hash", [bytes(32), b"\1" * 32])
def test_another_certificate_than_in_the_evidence_is_refused(tmp_path: Path, key_hash: bytes) -> None:
    chain, key, _ = certificate(tmp_path, "replica")
    with tls_server(chain, key) as url, pytest.raises(RemoteRefused, match="TLS"):
        client_for(httpx.URL(url), proven(key_hash))


def test_a_server_that_changes_its_certificate_later_is_not_spoken_to(tmp_path: Path) -> None:
    chain, key, key_hash = certificate(tmp_path, "replica")
    other_chain, other_key, _ = certificate(tmp_path, "other")
    with tls_server(chain, key) as url:
        client = client_for(httpx.URL(url), proven(key_hash))
        port = int(url.rpartition(":")[2])
    with tls_server(other_chain, other_key, port) as url, pytest.raises(httpx.ConnectError):
        asyncio.run(_get(client, url))


def test_a_certificate_that_cannot_be_read_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_pin, "certificate_of", lambda host, port: b"\x30\x00")
    with pytest.raises(RemoteRefused, match="cannot be read"):
        client_for(httpx.URL("https://127.0.0.1:1"), proven(b"\1" * 32))
