"""Receipts that outlive the process, where a directory is named for them."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from confidential.test_fuzz_exchange import a_record, asked, attester
from pilotlight.confidential.issuer import Issuer
from pilotlight.confidential.pins import VENDORS
from pilotlight.confidential.receipt_files import ReceiptFiles
from pilotlight.confidential.receipts import Exchange, Receipt, ReceiptRefused, verify_by_evidence, verify_receipt
from pilotlight.confidential.simulator import Simulator
from pilotlight.errors import ConfigError, RequestNotFound
from pilotlight.metering.signing import Signer

KEY = Ed25519PrivateKey.generate()


def issuer(directory: Path | None, max_kept: int = 100) -> Issuer:
    files = None if directory is None else ReceiptFiles(directory)
    return Issuer(Signer(KEY), lambda _: a_record(), None, VENDORS, max_kept, files)


def exchange() -> Exchange:
    found = Exchange.of(b"question")
    found.received(b"answer")
    return found


def given(by: Issuer, request_id: str = "req-1", is_own: bool = True) -> bytes:
    return asyncio.run(by.receipt(request_id, lambda _: is_own))


def test_a_receipt_survives_a_restart(tmp_path: Path) -> None:
    first = issuer(tmp_path / "kept")
    asyncio.run(first.ended("req-1", exchange()))
    receipt = given(first)
    assert given(issuer(tmp_path / "kept")) == receipt
    verify_receipt(receipt, KEY.public_key(), exchange())
    (file,) = (tmp_path / "kept").iterdir()
    assert (file.name, file.stat().st_mode & 0o777) == ("req-1.json", 0o600)
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o700
    with pytest.raises(RequestNotFound):
        given(issuer(tmp_path / "kept"), is_own=False)


def test_without_a_directory_it_does_not(tmp_path: Path) -> None:
    first = issuer(None)
    asyncio.run(first.ended("req-1", exchange()))
    assert given(first)
    with pytest.raises(RequestNotFound):
        given(issuer(None))


def test_what_memory_has_no_room_for_is_in_the_directory(tmp_path: Path) -> None:
    by = issuer(tmp_path, max_kept=1)
    for name in ("req-1", "req-2"):
        asyncio.run(by.ended(name, exchange()))
    assert given(by, "req-1")
    assert given(by, "req-2")


@pytest.mark.parametrize("name", ["../secret", "a/b", "", "x" * 129, "\0"])
def test_a_name_that_is_a_path_finds_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "kept").mkdir()
    assert ReceiptFiles(tmp_path / "kept").read(name) is None


def test_a_directory_that_cannot_be_written_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file/kept: receipts cannot be kept there"):
        ReceiptFiles(tmp_path / "file" / "kept")


def test_a_full_disk_costs_the_file_and_not_the_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    by = issuer(tmp_path / "kept")
    (tmp_path / "kept").rmdir()
    with caplog.at_level(logging.WARNING, "pilotlight.receipts"):
        asyncio.run(by.ended("req-1", exchange()))
    assert "cannot be written (No such file or directory)" in caplog.text
    assert given(by)


@pytest.mark.parametrize("issued_at", [2**63 - 1, -(2**63), 10**12])
def test_a_receipt_from_outside_the_calendar_is_refused(issued_at: int) -> None:
    """The time is read before anybody vouches for it: it is as of then that the evidence is looked at."""
    simulator = Simulator.create()
    content = json.loads(given(with_evidence(simulator)))
    header, claims, signature = content["profile"].split(".")
    profile = {**json.loads(base64.urlsafe_b64decode(claims + "==")), "issued_at": issued_at}
    altered = base64.urlsafe_b64encode(json.dumps(profile).encode()).rstrip(b"=").decode()
    content["profile"] = f"{header}.{altered}.{signature}"
    with pytest.raises(ReceiptRefused, match="time"):
        verify_by_evidence(json.dumps(content).encode(), asked(simulator))


def with_evidence(simulator: Simulator) -> Issuer:
    by_it = attester(simulator)
    by = Issuer(Signer(KEY), lambda _: a_record(), by_it, by_it.roots)
    for name in ("req-1", "req-2"):
        asyncio.run(by.ended(name, exchange()))
    return by


def test_receipts_in_memory_share_their_evidence() -> None:
    """It may have megabytes where there are GPUs, and ten thousand receipts are kept."""
    by = with_evidence(Simulator.create())
    first, second = (receipt.attestation for receipt in by._kept.values() if isinstance(receipt, Receipt))
    assert first is not None
    assert first is second
