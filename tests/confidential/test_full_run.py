"""A full run on one machine with the simulator: seal → key server → replica → proxy → streamed answer → receipt.

Everything is the real program in a process of its own. What can be done to the bytes between proxy and server is in
``test_proxy.py``; here it is what lies on the disk, and what each side demands.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from pilotlight.artifact import Artifact
from pilotlight.confidential.simulator import MEASUREMENT, Simulator
from pilotlight.metering.signing import make_signing_key

pytestmark = [pytest.mark.e2e, pytest.mark.model]
QUESTION = "What is 47 plus 38?"


@contextlib.contextmanager
def program(*arguments: str, ready: str) -> Iterator[str]:
    """Run a command until the block is left; yields what its line that says ``ready`` names."""
    command = [sys.executable, "-m", "pilotlight", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            found = next((match[1] for line in lines if (match := re.search(ready, line))), None)
            if found is None:
                assert process.stderr is not None
                raise DidNotStart(process.stderr.read())
            yield found
        finally:
            process.terminate()
            process.communicate(timeout=300)


class DidNotStart(AssertionError):
    pass


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pilotlight", *arguments], capture_output=True, text=True)


@dataclass(frozen=True)
class Site:
    """One machine: a sealed artifact, its key, the simulated chip, and everybody's policies."""

    directory: Path
    digest: str

    def write_policies(self, simulator: Simulator, measurement: str = MEASUREMENT.hex(), digest: str = "") -> None:
        trust = f'[trust]\nsimulated = ["{simulator.root_fingerprint}"]\n'
        evidence = f'kinds = ["simulated"]\nclaims.measurement = ["{measurement}"]\n'
        asked = f'labels = ["simulated"]\nartifacts = ["{digest or self.digest}"]\n'
        rule = f'[[release]]\nresource = "default/key/demo"\n{asked}[release.evidence]\n{evidence}'
        (self.directory / "keys.toml").write_text(trust + rule)
        (self.directory / "remote.toml").write_text(f"{asked}[evidence]\n{evidence}{trust}")

    def write_config(self, keys_url: str) -> Path:
        path = self.directory / "pilotlight.toml"
        path.write_text(
            f"""
[host]
signing_key = "{self.directory}/receipts"
cache_dir = "{self.directory}/cache"
[confidential]
evidence = "simulator"
simulator = "{self.directory}/simulator.pem"
encrypted_prompts = "required"
receipts = true
[functions.demo]
artifact = "{self.directory}/sealed"
num_threads = 2
[functions.demo.prices]
prompt_per_million_tokens = "100"
[functions.demo.unseal]
publisher = "{self.directory}/publisher.pub"
release = "kbs"
url = "{keys_url}"
"""
        )
        return path

    @contextlib.contextmanager
    def key_server(self) -> Iterator[str]:
        arguments = ("--policy", str(self.directory / "keys.toml"), "--keys", str(self.directory / "keys"))
        with program("keyserver", *arguments, "--port", "0", ready=r"key server (\S+)") as url:
            yield url

    @contextlib.contextmanager
    def server(self) -> Iterator[str]:
        ledger = str(self.directory / "usage.db")
        with self.key_server() as keys_url:
            config = str(self.write_config(keys_url))
            arguments = ("--config", config, "--port", "0", "--ledger", ledger)
            with program("serve", *arguments, ready=r"serving (\S+)/v1") as url:
                yield url

    @contextlib.contextmanager
    def proxy(self, url: str) -> Iterator[str]:
        arguments = ("--policy", str(self.directory / "remote.toml"), "--receipts", str(self.directory / "kept"))
        with program("proxy", url, *arguments, "--port", "0", ready=r"forwarding (\S+)/v1") as own:
            yield own


@pytest.fixture(scope="module")
def sealed_once(demo_int4: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Site:
    directory = tmp_path_factory.mktemp("site")
    make_signing_key(directory / "publisher")
    make_signing_key(directory / "receipts")
    done = command(
        "seal", str(demo_int4.path), "--recipient", "kbs:///default/key/demo", "--signing-key",
        str(directory / "publisher"), "--keys", str(directory / "keys"), "--out", str(directory / "sealed"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    site = Site(directory, demo_int4.digest)
    site.write_policies(Simulator.open(directory / "simulator.pem"))
    return site


@pytest.fixture
def site(sealed_once: Site, tmp_path: Path) -> Site:
    shutil.copytree(sealed_once.directory, tmp_path / "site")
    return Site(tmp_path / "site", sealed_once.digest)


def ask(url: str) -> str:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": QUESTION}], stream=True, max_tokens=8
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def test_seal_release_serve_ask_and_verify(site: Site) -> None:
    with site.server() as url, site.proxy(url) as own:
        assert ask(own) == "85"
        with pytest.raises(openai.BadRequestError, match="takes encrypted bodies only"):
            ask(url)
    (receipt,) = (site.directory / "kept").iterdir()
    policy = str(site.directory / "remote.toml")
    verified = command("receipt", "verify", str(receipt), "--policy", policy, "--json")
    assert verified.returncode == 0, verified.stderr
    profile = json.loads(verified.stdout)
    assert profile["record"]["artifact_digest"] == site.digest
    assert profile["record"]["completion_tokens"] == 3
    assert profile["record"]["cost_micros"] > 0
    assert profile["record"]["unseal_ms"] > 0
    assert profile["tee"] == "simulated"
    by_key = command("receipt", "verify", str(receipt), "--public-key", str(site.directory / "receipts.pub"))
    assert by_key.returncode == 0, by_key.stderr

    content = receipt.read_text()
    receipt.write_text(content[:300] + ("A" if content[300] != "A" else "B") + content[301:])
    refused = command("receipt", "verify", str(receipt), "--policy", policy)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    ledger = (site.directory / "usage.db").read_bytes()
    assert b"47 plus 38" not in ledger


def refusal(site: Site) -> str:
    with pytest.raises(DidNotStart) as refused, site.server():
        pass
    assert "Traceback" not in str(refused.value)
    return str(refused.value)


def _flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_tampered_weights_stop_the_start(site: Site) -> None:
    _flip(site.directory / "sealed" / "model.onnx.data.sealed")
    assert "model.onnx.data.sealed: was altered" in refusal(site)


def test_a_tampered_manifest_stops_the_start(site: Site) -> None:
    _flip(site.directory / "sealed" / "sealed.json", 40)
    assert "was altered, or signed by another publisher" in refusal(site)


def test_a_tampered_signature_stops_the_start(site: Site) -> None:
    _flip(site.directory / "sealed" / "sealed.json.sig", 10)
    assert "was altered, or signed by another publisher" in refusal(site)


def test_another_publisher_stops_the_start(site: Site) -> None:
    make_signing_key(site.directory / "somebody")
    shutil.copy(site.directory / "somebody.pub", site.directory / "publisher.pub")
    assert "was altered, or signed by another publisher" in refusal(site)


def test_a_missing_chunk_stops_the_start(site: Site) -> None:
    path = site.directory / "sealed" / "tokenizer.json.sealed"
    path.write_bytes(path.read_bytes()[:-1])
    assert "tokenizer.json.sealed" in refusal(site)


def test_an_artifact_that_the_key_is_not_for_stops_the_start(site: Site) -> None:
    site.write_policies(Simulator.open(site.directory / "simulator.pem"), digest=f"sha256:{'0' * 64}")
    assert "the artifact is sha256:" in refusal(site)


def test_another_key_stops_the_start(site: Site) -> None:
    _flip(site.directory / "keys" / "default" / "key" / "demo")
    assert "is sealed with another key" in refusal(site)


def test_a_machine_that_the_key_servers_policy_does_not_know_gets_no_key(site: Site) -> None:
    site.write_policies(Simulator.create())
    assert "unknown_root" in refusal(site)
    site.write_policies(Simulator.open(site.directory / "simulator.pem"), measurement="00" * 48)
    assert "measurement" in refusal(site)


def test_a_machine_that_the_clients_policy_does_not_know_gets_no_prompt(site: Site) -> None:
    with site.server() as url:
        site.write_policies(Simulator.create())
        with site.proxy(url) as own, pytest.raises(openai.APIStatusError, match="unknown_root"):
            ask(own)
    assert not list((site.directory / "kept").iterdir())
