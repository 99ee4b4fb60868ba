"""What `pilotlight seal`, `keyserver`, `proxy` and `receipt verify` say to bad input: one line, no traceback."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from confidential.test_receipts_kept import KEY, exchange, given, issuer
from pilotlight.artifact import Artifact
from pilotlight.cli import main
from pilotlight.confidential.recipients import make_recipient_key
from pilotlight.metering.signing import make_signing_key

KEYS_POLICY = '[[release]]\nresource = "default/key/toy"\n[release.evidence]\nkinds = ["simulated"]\n'
REMOTE_POLICY = '[evidence]\nkinds = ["simulated"]\n'


@pytest.fixture
def site(toy_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with everything that the commands need, which is the working directory, too."""
    import asyncio

    monkeypatch.chdir(tmp_path)
    (tmp_path / "artifact").symlink_to(toy_artifact.path)
    make_signing_key(tmp_path / "publisher")
    make_signing_key(tmp_path / "somebody")
    make_recipient_key(tmp_path / "recipient")
    (tmp_path / "keys.toml").write_text(KEYS_POLICY)
    (tmp_path / "remote.toml").write_text(REMOTE_POLICY)
    (tmp_path / "broken.toml").write_text("[[")
    (tmp_path / "text").write_text("nothing of use")
    (tmp_path / "keys").mkdir()
    by = issuer(None)
    asyncio.run(by.ended("req-1", exchange()))
    (tmp_path / "receipt.json").write_bytes(given(by))
    (tmp_path / "truncated.json").write_bytes(given(by)[:-100])
    (tmp_path / "empty").touch()
    return tmp_path


def one_line(*arguments: str) -> str:
    """Run a command that fails, and return the one line that it says; of wrong usage, the last one."""
    result = CliRunner().invoke(main, [*arguments], prog_name="pilotlight")
    assert result.exit_code in (1, 2), result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 or lines[0].startswith("Usage: "), result.stderr
    return lines[-1]


SEAL = ("--signing-key", "publisher", "--out", "sealed")
SEAL_REFUSALS = {
    ("missing", "--recipient", "recipient.pub", *SEAL): "missing",
    ("text", "--recipient", "recipient.pub", *SEAL): "text",
    ("artifact", "--recipient", "recipient", *SEAL): "recipient: holds no public key in PEM",
    ("artifact", "--recipient", "nobody.pub", *SEAL): "nobody.pub: cannot be read (No such file or directory)",
    ("artifact", "--recipient", "publisher.pub", *SEAL): "publisher.pub: is neither an X25519 nor an RSA public key",
    ("artifact", "--recipient", "text", *SEAL): "text: holds no public key in PEM",
    ("artifact", "--recipient", "kbs:///a", *SEAL): "expected kbs:///REPOSITORY/TYPE/TAG",
    ("artifact", "--recipient", "kbs:///a/b/c", *SEAL): "needs a directory for the key: --keys DIR",
    ("artifact", "--recipient", "kbs:///a/b/c", *SEAL, "--keys", "text"): "text/a/b/c: cannot be written",
    ("artifact", "--recipient", "arn:aws:s3", *SEAL): "expected the ARN of a key of AWS KMS",
    ("artifact", "--recipient", "https://v/keys/a", *SEAL): "expected https://VAULT/keys/NAME/VERSION=PUBLIC_KEY.pem",
    ("artifact", "--recipient", "recipient.pub", "--signing-key", "nobody", "--out", "x"): "nobody: cannot be read",
    ("artifact", "--recipient", "recipient.pub", "--signing-key", "text", "--out", "x"): "text: ",
    ("artifact", "--recipient", "recipient.pub", "--signing-key", "recipient", "--out", "x"): "recipient: ",
    ("artifact", "--recipient", "recipient.pub", "--signing-key", "publisher", "--out", "keys"): "exists already",
    ("artifact", "--recipient", "recipient.pub", "--signing-key", "publisher", "--out", "text/x"): "cannot be read or",
    ("artifact", *SEAL): "Missing option '--recipient'",
}


@pytest.mark.parametrize("arguments", SEAL_REFUSALS, ids=" ".join)
def test_what_cannot_be_sealed_is_said_in_one_line(site: Path, arguments: tuple[str, ...]) -> None:
    assert SEAL_REFUSALS[arguments] in one_line("seal", *arguments)
    assert not (site / "sealed").exists()
    assert not list(site.glob(".*sealed*"))
    assert not list((site / "keys").iterdir())


@pytest.fixture
def busy_port() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield str(taken.getsockname()[1])


KEYSERVER_REFUSALS = {
    ("--policy", "missing.toml", "--keys", "keys"): "missing.toml: cannot be read (No such file or directory)",
    ("--policy", "broken.toml", "--keys", "keys"): "broken.toml: is not a policy",
    ("--policy", "remote.toml", "--keys", "keys"): "remote.toml: is not a policy",
    ("--policy", "keys", "--keys", "keys"): "keys: cannot be read (Is a directory)",
    ("--policy", "keys.toml", "--keys", "missing"): "missing: is not a directory",
    ("--policy", "keys.toml", "--keys", "keys", "--tls-certificate", "text"): "the TLS certificate cannot be used",
    ("--policy", "keys.toml", "--keys", "keys", "--tls-certificate", "nobody"): "the TLS certificate cannot be used",
    ("--policy", "keys.toml", "--keys", "keys", "--tls-key", "publisher"): "--tls-key needs --tls-certificate",
    ("--policy", "keys.toml", "--keys", "keys", "--address", "192.0.2.1"): "cannot listen on 192.0.2.1:0",
    ("--policy", "keys.toml"): "Missing option '--keys'",
}


@pytest.mark.parametrize("arguments", KEYSERVER_REFUSALS, ids=" ".join)
def test_a_key_server_that_cannot_start_says_why(site: Path, arguments: tuple[str, ...]) -> None:
    assert KEYSERVER_REFUSALS[arguments] in one_line("keyserver", *arguments, "--port", "0")


PROXY_REFUSALS = {
    ("http://127.0.0.1:1", "--policy", "missing.toml"): "missing.toml: cannot be read (No such file or directory)",
    ("http://127.0.0.1:1", "--policy", "broken.toml"): "broken.toml: is not a policy",
    ("http://127.0.0.1:1", "--policy", "keys.toml"): "keys.toml: is not a policy",
    ("127.0.0.1:1", "--policy", "remote.toml"): "127.0.0.1:1: ",
    ("ftp://host", "--policy", "remote.toml"): "ftp://host: expected http:// or https:// and a host",
    ("http://", "--policy", "remote.toml"): "http://: expected http:// or https:// and a host",
    ("http://127.0.0.1:1", "--policy", "remote.toml", "--model", "toy"): "the remote cannot be reached (ConnectError)",
    ("https://127.0.0.1:1", "--policy", "remote.toml", "--model", "toy"): "the remote cannot be reached",
    ("http://127.0.0.1:1", "--policy", "remote.toml", "--receipts", "text"): "text: receipts cannot be kept there",
    ("http://127.0.0.1:1",): "Missing option '--policy'",
}


@pytest.mark.parametrize("arguments", PROXY_REFUSALS, ids=" ".join)
def test_a_proxy_that_cannot_start_says_why(site: Path, arguments: tuple[str, ...]) -> None:
    assert PROXY_REFUSALS[arguments] in one_line("proxy", *arguments, "--port", "0")


def test_a_port_that_is_taken_is_named(site: Path, busy_port: str) -> None:
    expected = f"pilotlight: cannot listen on 127.0.0.1:{busy_port}: Address already in use"
    assert one_line("keyserver", "--policy", "keys.toml", "--keys", "keys", "--port", busy_port) == expected
    assert one_line("proxy", "http://127.0.0.1:1", "--policy", "remote.toml", "--port", busy_port) == expected


VERIFY_REFUSALS = {
    ("missing.json", "--policy", "remote.toml"): "'missing.json' does not exist",
    ("keys", "--policy", "remote.toml"): "'keys' is a directory",
    ("receipt.json",): "name either a --policy or a --public-key",
    ("receipt.json", "--policy", "remote.toml", "--public-key", "somebody.pub"): "name either",
    ("receipt.json", "--policy", "remote.toml"): "the receipt has no evidence: its label is none",
    ("receipt.json", "--policy", "broken.toml"): "broken.toml: is not a policy",
    ("receipt.json", "--public-key", "somebody.pub"): "the receipt was altered, or signed with another key",
    ("receipt.json", "--public-key", "text"): "text: ",
    ("receipt.json", "--public-key", "recipient.pub"): "recipient.pub: ",
    ("receipt.json", "--public-key", "somebody.pub", "--request", "text"): "--request and --response go together",
    ("truncated.json", "--public-key", "somebody.pub"): "this is not a receipt",
    ("text", "--public-key", "somebody.pub"): "this is not a receipt",
    ("empty", "--policy", "remote.toml"): "this is not a receipt",
}


@pytest.mark.parametrize("arguments", VERIFY_REFUSALS, ids=" ".join)
def test_a_receipt_that_cannot_be_verified_is_refused_in_one_line(site: Path, arguments: tuple[str, ...]) -> None:
    assert VERIFY_REFUSALS[arguments] in one_line("receipt", "verify", *arguments)


def test_a_receipt_of_another_exchange_is_refused(site: Path) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    pem = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (site / "issuer.pub").write_bytes(pem)
    (site / "question").write_text("question")
    arguments = ("receipt.json", "--public-key", "issuer.pub", "--request", "question", "--response")
    assert "the receipt is of another response" in one_line("receipt", "verify", *arguments, "text")
    (site / "answer").write_text("answer")
    done = CliRunner().invoke(main, ["receipt", "verify", *arguments, "answer"])
    assert done.exit_code == 0, done.output
    assert "simulated, by the signer's own word" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "arguments",
    [
        ("keyserver", "--policy", "keys.toml", "--keys", "keys"),
        ("proxy", "http://127.0.0.1:1", "--policy", "remote.toml"),
    ],
    ids=["keyserver", "proxy"],
)
def test_a_signal_ends_it_without_a_word(site: Path, arguments: tuple[str, ...], number: int) -> None:
    ends = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # background jobs ignore it
    command = [sys.executable, "-c", f"{ends}; from pilotlight.cli import main; main()", *arguments, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert "http://127.0.0.1:" in process.stdout.readline()
            process.send_signal(number)
            _, said = process.communicate(timeout=300)
        finally:
            process.kill()
    assert (process.returncode, said) == (0, "")
