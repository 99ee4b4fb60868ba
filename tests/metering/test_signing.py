"""Receipts: signed records that can be verified without a server, and nothing else passes for one."""

from __future__ import annotations

import asyncio
import base64
import json
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from admissions import admission, ended
from pilotlight.errors import ConfigError
from pilotlight.metering.ledger import Ledger
from pilotlight.metering.ledger_reader import LedgerReader
from pilotlight.metering.signing import NotAReceipt, Signer, Verifier, make_signing_key
from pilotlight.request import FinishReason


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "signing.pem"
    make_signing_key(path)
    return path


@pytest.fixture(scope="module")
def verifier(key: Path) -> Verifier:
    return Verifier.from_file(key.with_name("signing.pem.pub"))


@pytest.fixture(scope="module")
def receipt(key: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    with Ledger(tmp_path_factory.mktemp("ledger") / "u.db", Signer.from_file(key)) as ledger:
        admitted = admission("größe-👩", None)
        asyncio.run(ledger.admit(admitted))
        asyncio.run(ledger.finish(ended(admitted, completion_tokens=2)))
        found = ledger.receipt("größe-👩")
    assert found is not None
    return found


def test_a_receipt_holds_its_record(receipt: str, verifier: Verifier) -> None:
    record = verifier.verify(receipt)
    assert (record.request_id, record.completion_tokens) == ("größe-👩", 2)


def test_a_crash_is_signed_too(key: Path, verifier: Verifier, tmp_path: Path) -> None:
    path = tmp_path / "u.db"
    with Ledger(path) as ledger:
        asyncio.run(ledger.admit(admission("a", None)))
    with Ledger(path, Signer.from_file(key)), LedgerReader(path) as reader:
        (receipt,) = reader.receipts()
    assert verifier.verify(receipt).finish_reason is FinishReason.CRASHED


def test_without_a_key_nothing_is_signed(tmp_path: Path) -> None:
    path = tmp_path / "u.db"
    with Ledger(path) as ledger, LedgerReader(path) as reader:
        asyncio.run(ledger.admit(admission("a", None)))
        asyncio.run(ledger.finish(ended(admission("a", None), 1)))
        assert ledger.receipt("a") is None
        assert list(reader.receipts()) == []


def test_another_key_does_not_verify(receipt: str, tmp_path: Path) -> None:
    other = Verifier.from_file(make_signing_key(tmp_path / "other.pem"))
    with pytest.raises(NotAReceipt, match="was altered, or signed with another key"):
        other.verify(receipt)


def test_an_altered_record_does_not_verify(receipt: str, verifier: Verifier) -> None:
    header, payload, signature = receipt.split(".")
    fields = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    fields["cost_micros"] = 0
    cheaper = base64.urlsafe_b64encode(json.dumps(fields).encode()).rstrip(b"=").decode()
    with pytest.raises(NotAReceipt):
        verifier.verify(f"{header}.{cheaper}.{signature}")


def test_a_receipt_that_says_it_is_not_signed_does_not_verify(receipt: str, verifier: Verifier) -> None:
    _, payload, signature = receipt.split(".")
    none = base64.urlsafe_b64encode(b'{"alg":"none"}').rstrip(b"=").decode()
    for forged in (f"{none}.{payload}.{signature}", f"{none}.{payload}."):
        with pytest.raises(NotAReceipt):
            verifier.verify(forged)


@given(st.text(max_size=60) | st.text("abcAB01-_.", max_size=60))
def test_nothing_else_is_a_receipt(verifier: Verifier, text: str) -> None:
    with pytest.raises(NotAReceipt):
        verifier.verify(text)


def test_the_private_key_is_its_owner_s_alone_and_never_overwritten(key: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="cannot be written"):
        make_signing_key(key)


@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_what_is_no_key_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "key.pem"
    if content is not None:
        path.write_bytes(content)
    for opener in (Signer.from_file, Verifier.from_file):
        with pytest.raises(ConfigError) as caught:
            opener(path)
        assert caught.value.message.startswith(f"{path}: ")
