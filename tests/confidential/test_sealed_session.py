"""A sealed model runs as the open one does, from memory alone, and its replicas say how long decrypting took."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from pilotlight.artifact import Artifact
from pilotlight.confidential.key_release import Unsealing
from pilotlight.confidential.recipients import make_recipient_key
from pilotlight.confidential.sealing import Publisher, seal
from pilotlight.engine.session import OnnxSession
from pilotlight.metering.signing import make_signing_key, read_signing_key
from support import PATIENCE_S, config_process

pytestmark = pytest.mark.model

PROMPT = np.arange(5, 25, dtype=np.int64)


def sealed_copy(artifact: Artifact, directory: Path) -> tuple[Path, dict[str, str]]:
    """Seal an artifact; return where, and its ``[functions.NAME.unseal]``."""
    make_signing_key(directory / "publisher")
    make_recipient_key(directory / "recipient")
    publisher = Publisher(
        read_signing_key(directory / "publisher"), [str(directory / "recipient.pub")], None, lambda _, key: key
    )
    seal(artifact, directory / "sealed", publisher, 64 * 1024)
    return directory / "sealed", {
        "publisher": str(directory / "publisher.pub"),
        "release": "file",
        "private_key": str(directory / "recipient"),
    }


@pytest.mark.parametrize("precision", ["int4", "hybrid"])
def test_logits_are_those_of_the_open_artifact(
    demo_artifact: Callable[[str], Artifact], precision: str, tmp_path: Path
) -> None:
    artifact = demo_artifact(precision)
    path, table = sealed_copy(artifact, tmp_path)
    opened = Unsealing.parse(table, "unseal").open(path)
    kept = tmp_path / "kept"
    sessions = [OnnxSession(one, 2, 64, 1, directory) for one, directory in ((artifact, None), (opened, kept))]
    assert not kept.exists(), "an optimized graph on the disk would be the model in clear"
    logits = [session.prefill(0, PROMPT, 0).copy() for session in sessions]
    assert np.array_equal(logits[0], logits[1])
    steps = [session.decode(np.array([7]), np.array([len(PROMPT)])).copy() for session in sessions]
    assert np.array_equal(steps[0], steps[1])
    assert opened.contents is not None
    assert opened.contents.read_s > 0


@pytest.mark.e2e
def test_a_server_serves_a_sealed_artifact(demo_int4: Artifact, tmp_path: Path) -> None:
    path, table = sealed_copy(demo_int4, tmp_path)
    config = tmp_path / "pilotlight.toml"
    lines = "\n".join(f'{key} = "{value}"' for key, value in table.items())
    cache = tmp_path / "cache"
    config.write_text(
        f'[host]\ncache_dir = "{cache}"\n[functions.demo]\nartifact = "{path}"\nnum_threads = 2\n'
        f"[functions.demo.unseal]\n{lines}\n"
    )
    with config_process(config, tmp_path / "usage.db") as server:
        body = {"model": "demo", "messages": [{"role": "user", "content": "What is 47 plus 38?"}], "max_tokens": 8}
        answers = [
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=PATIENCE_S).json() for _ in range(2)
        ]
        assert [answer["choices"][0]["message"]["content"] for answer in answers] == ["85", "85"]
        record = httpx.get(f"{server.url}/v1/usage/{answers[0]['id']}", timeout=PATIENCE_S).json()
        assert record["artifact_digest"] == demo_int4.digest
        assert 0 < record["unseal_ms"] < record["cold_start_ms"]
        assert (
            'pilotlight_replica_start_seconds_count{function="demo",stage="unseal"} 1.0'
            in httpx.get(f"{server.url}/metrics", timeout=PATIENCE_S).text
        )
    in_clear = (demo_int4.path / "model.onnx.data").read_bytes()[:4096]
    for directory, _, files in os.walk(tmp_path):
        for file in files:
            assert in_clear not in (Path(directory) / file).read_bytes(), file


@pytest.mark.e2e
def test_weights_that_are_altered_behind_the_host_never_run(demo_int4: Artifact, tmp_path: Path) -> None:
    path, table = sealed_copy(demo_int4, tmp_path)
    config = tmp_path / "pilotlight.toml"
    lines = "\n".join(f'{key} = "{value}"' for key, value in table.items())
    config.write_text(f'[functions.demo]\nartifact = "{path}"\n[functions.demo.unseal]\n{lines}\n')
    with config_process(config, tmp_path / "usage.db") as server:
        weights = path / "model.onnx.data.sealed"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        body = {"model": "demo", "prompt": "hi", "max_tokens": 2}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE_S)
    assert answer.status_code == 503
    assert "model.onnx.data.sealed: was altered" in answer.json()["error"]["message"]
    assert str(tmp_path) not in answer.text
