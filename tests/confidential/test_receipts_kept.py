"""Receipts that outlive the process, where a directory is named for them."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from confidential.test_fuzz_exchange import a_record
from pilotlight.confidential.issuer import Issuer
from pilotlight.confidential.pins import VENDORS
from pilotlight.confidential.receipt_files import ReceiptFiles
from pilotlight.confidential.receipts import Exchange, verify_receipt
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
