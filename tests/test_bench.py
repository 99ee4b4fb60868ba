"""What the benchmark computes and survives, without any model."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from http_client import token_times
from measure import Stream, steady_tokens_per_s, total_tokens_per_s
from memory import Memory, resident
from models import SHAPES, Shape
from peer import Opened, Peer, PeerFailed, Setting
from pilotlight.artifact import Artifact
from report import roofline_shares, table
from results import PeerRecord, Result, read
from rows import WORKLOADS, step_bytes
from run import measure_cold_start, measure_shape, resumed, run_shape
from servers import OUR_ENGINE, OURS, Pilotlight
from workers import OurEngine, Worker

SHAPE = SHAPES["smollm2-135m"]
MACHINE = {"processor": "a processor", "threads_of_each_peer": 2, "instructions": ["avx2"]}
WORKER = """
import os, sys, time
sys.path.insert(0, {peers!r})
from line_protocol import serve

class Generator:
    def __init__(self, load):
        print("a library that prints")
        self.options = load.options

    def generate(self, prompts, num_tokens):
        if self.options.get("dies"):
            os._exit(1)
        if num_tokens > 8:
            raise MemoryError("too many")
        return [[time.monotonic()] * num_tokens for _ in prompts]

serve(Generator, ("numpy",))
"""


class FakePeer:
    """Answers every token ``step_s`` after the one before; fails from the asking numbered ``fails_at`` on."""

    def __init__(self, name: str, step_s: float, *, fails_at: int = 1000, opens: bool = True) -> None:
        self.name, self.is_four_bit = name, not name.endswith("fp32")
        self.is_server = name in (OURS, "server")
        self.versions = {name: "1.0"}
        self.asked: list[list[list[int]]] = []
        self._step_s, self._fails_at, self._opens = step_s, fails_at, opens

    def missing(self) -> str | None:
        return None

    def prepare(self, shape: Shape, source: Path, directory: Path) -> Path:
        return source

    @contextmanager
    def open(self, model: Path, setting: Setting) -> Iterator[Opened]:
        if not self._opens:
            raise PeerFailed("it did not open")
        yield self

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[Stream]:
        self.asked.append(prompts)
        if len(self.asked) > self._fails_at:
            raise PeerFailed("it fell over")
        times = [self._step_s * (number + 1) for number in range(num_tokens)]
        return [Stream(0.0, times) for _ in prompts]

    def peak_memory(self) -> Memory:
        return Memory(100 * self._step_s, 1.0)


def measured(peers: list[FakePeer], rows: list[str], directory: Path, rounds: int = 3) -> Result:
    result = Result(SHAPE.name, "hybrid", "0" * 64, dict(MACHINE))
    models: dict[Peer, Path] = dict.fromkeys(peers, directory)
    path = directory / "result.json"
    measure_shape(SHAPE, models, [WORKLOADS[row] for row in rows], rounds, 1, result, path)
    assert read(path) == result
    return result


def decode_figures(result: Result) -> dict[str, list[float | None]]:
    return result.rows["decode-128"]["decode, 1 stream, context 128, tok/s"]


def test_peers_alternate_and_see_new_prompts(tmp_path: Path) -> None:
    peers = [FakePeer(OURS, 0.01), FakePeer("other", 0.02)]
    result = measured(peers, ["decode-128"], tmp_path)
    assert decode_figures(result)[OURS] == pytest.approx([100] * 3)
    assert decode_figures(result)["other"] == pytest.approx([50] * 3)
    assert peers[0].asked == peers[1].asked
    assert len({tuple(prompts[0]) for prompts in peers[0].asked}) == 4  # a warm-up and three rounds


def test_a_peer_that_fails_loses_only_its_own_figures(tmp_path: Path) -> None:
    peers = [FakePeer(OURS, 0.01), FakePeer("falls", 0.02, fails_at=2), FakePeer("shut", 0.02, opens=False)]
    result = measured(peers, ["decode-128", "streams-8"], tmp_path)
    assert decode_figures(result)["falls"] == [pytest.approx(50), None, None]
    assert decode_figures(result)[OURS] == pytest.approx([100] * 3)
    assert result.errors["decode-128"] == {"falls": "it fell over"}
    assert result.errors["1 slots"] == {"shut": "it did not open"}
    assert result.rows["streams-8"]["8 streams, steady decode, tok/s"][OURS] == pytest.approx([800] * 3)
    assert "falls failed: it fell over" in table(result)


def test_the_table_compares_like_with_like(tmp_path: Path) -> None:
    """Our server with servers, our engine with libraries."""
    steps = {OURS: 0.010, OUR_ENGINE: 0.008, "server": 0.020, "slow": 0.020, "good": 0.012, "torch-fp32": 0.001}
    result = measured([FakePeer(*peer) for peer in steps.items()], ["decode-128", "streams-8"], tmp_path)
    result.peers["absent"] = PeerRecord("not installed: the program absent", True, True)
    lines = table(result).splitlines()
    decode, steady, memory = (
        next(line for line in lines if line.startswith(f"| {start}"))
        for start in ("decode, 1 stream, context 128", "8 streams, steady", "8 streams, peak anonymous")
    )
    assert decode.endswith("| server | 2.00 (2.00–2.00) | good | 1.50 (1.50–1.50) | ≥ 1 | met |")
    assert steady.endswith("| server | 2.00 (2.00–2.00) | good | 1.50 (1.50–1.50) | ≥ 1.6 | met |"), (
        "libraries have no HTTP"
    )
    assert memory.endswith("| server | 0.50 (0.50–0.50) | good | 0.67 (0.67–0.67) | ≤ 1 | met |")
    assert "- absent: not installed: the program absent" in lines


def test_one_stream_must_reach_what_is_asked_beside_both(tmp_path: Path) -> None:
    for engine_step_s, verdict in ((0.012, "met"), (0.013, "**missed**")):
        steps = {OURS: 0.010, OUR_ENGINE: engine_step_s, "server": 0.020, "library": 0.012}
        result = measured([FakePeer(*peer) for peer in steps.items()], ["decode-128"], tmp_path)
        line = next(line for line in table(result).splitlines() if line.startswith("| decode, 1 stream"))
        assert line.endswith(f"| ≥ 1 | {verdict} |")


def test_without_peers_the_table_has_figures_and_no_verdict(tmp_path: Path) -> None:
    result = measured([FakePeer(OURS, 0.010)], ["decode-128"], tmp_path)
    line = next(line for line in table(result).splitlines() if line.startswith("| decode, 1 stream"))
    assert line.endswith("| 100.0 (100.0–100.0) |  | – |  | – | ≥ 1 |  |")


def test_shares_of_the_roofline_follow_from_the_bytes_of_a_step(tmp_path: Path) -> None:
    result = measured([FakePeer(OURS, 0.01)], ["decode-128"], tmp_path)
    num_bytes = step_bytes(SHAPE, 160)
    result.bandwidth_gb_per_s["decode-128"] = [num_bytes * 200 / 1e9]
    assert roofline_shares(result, WORKLOADS["decode-128"], [OURS]) == [pytest.approx(0.5)]


def test_a_step_reads_the_weights_once_and_the_cache() -> None:
    matrices = 49152 * 576 + 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576)
    assert step_bytes(SHAPE, 0) == matrices * 9 // 16
    assert step_bytes(SHAPE, 100) - step_bytes(SHAPE, 0) == 100 * 30 * 2 * 192 * 2


def test_resuming_keeps_rows_and_refuses_another_model(tmp_path: Path) -> None:
    old = measured([FakePeer(OURS, 0.01)], ["decode-128"], tmp_path)
    assert resumed(old, replace(old, rows={})) is old
    with pytest.raises(SystemExit, match="another model"):
        resumed(old, replace(old, model_sha256="1" * 64))


def test_a_resumed_run_measures_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / SHAPE.name).mkdir()
    (tmp_path / SHAPE.name / "config.json").write_text("{}")
    (tmp_path / SHAPE.name / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr("run.plot", lambda result, path: path.write_text("<svg/>"))
    settings = {"models": tmp_path, "out": tmp_path, "recipe": "hybrid", "threads": 1, "rounds": 2}
    peer = FakePeer(OURS, 0.01)
    for rows in (["decode-128"], ["decode-128", "prefill"]):
        args = argparse.Namespace(**settings, rows=rows, resume=True, prepare_only=False)
        run_shape(SHAPE, [peer], args)
    assert [len(prompts[0]) for prompts in peer.asked] == [128] * 3 + [512] * 3
    assert [*read(tmp_path / "bench-hybrid-smollm2-135m.json").rows] == ["decode-128", "prefill"]


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    scripts = Path(sys.modules["workers"].__file__ or "").parent / "peers"
    (tmp_path / "worker.py").write_text(WORKER.format(peers=str(scripts)))
    monkeypatch.setattr("workers.SCRIPTS", tmp_path)
    return Worker("fake", "worker.py", Path(sys.executable))


def test_a_worker_answers_over_its_pipe_and_survives_an_error(worker: Worker, tmp_path: Path) -> None:
    with worker.open(tmp_path, Setting(1, 1, 512)) as opened:
        assert set(opened.versions) == {"numpy"}
        before = time.monotonic()
        first, second = opened.generate([[1], [2]], 3)
        assert before <= first.sent_at <= first.token_times[0] <= second.token_times[-1] <= time.monotonic()
        with pytest.raises(PeerFailed, match="MemoryError: too many"):
            opened.generate([[1]], 9)
        assert len(opened.generate([[1]], 2)[0].token_times) == 2


def test_a_worker_that_dies_is_a_failed_peer(worker: Worker, tmp_path: Path) -> None:
    dying = replace(worker, options=(("dies", True),))
    with dying.open(tmp_path, Setting(1, 1, 512)) as opened, pytest.raises(PeerFailed, match="ended"):
        opened.generate([[1]], 1)


@pytest.mark.model
def test_our_engine_answers_as_a_library_does(demo_int4: Artifact) -> None:
    with OurEngine(Pilotlight("int4")).open(demo_int4.path, Setting(1, 2, 256)) as opened:
        answers = opened.generate([[5, 6, 7], [8, 9, 10]], 4)
    assert [len(answer.token_times) for answer in answers] == [4, 4]
    assert opened.versions.keys() == {"pilotlight", "onnxruntime"}


def test_tokens_count_when_their_event_is_complete() -> None:
    pieces = [(1.0, b'data: {"n": 2}\n\nda'), (2.0, b'ta: {"n"'), (3.0, b": 1}\n\ndata: [DONE]\n\n")]
    assert token_times(pieces, lambda event: int(event["n"])) == [1.0, 1.0, 3.0]


def test_steady_speed_leaves_out_prefill_and_total_does_not() -> None:
    answers = [Stream(0.0, [1.0, 2.0, 3.0, 4.0]), Stream(0.0, [2.0, 3.0, 4.0, 5.0])]
    assert steady_tokens_per_s(answers) == pytest.approx(2.0)
    assert total_tokens_per_s(answers) == pytest.approx(8 / 5)


@contextmanager
def script_process(script: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a script that prints a line once it is ready, and ends with its input."""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.stdin.close()


def test_memory_of_a_process_is_anonymous_and_mapped() -> None:
    script = (
        "import os, sys; print(flush=True); sys.stdin.readline()\n"
        "held = bytearray(os.urandom(1) * (64 << 20)); print(flush=True); sys.stdin.read()"
    )
    with script_process(script) as process:
        before = resident(process.pid)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        after = resident(process.pid)
    assert 60 < after.anonymous_mib - before.anonymous_mib < 70
    assert before.mapped_mib > 1


def test_memory_that_forked_processes_share_is_counted_once() -> None:
    script = (
        "import os, sys; held = bytearray(os.urandom(1) * (64 << 20)); child = os.fork()\n"
        "if child: print(flush=True)\n"
        "sys.stdin.read(); os.waitpid(child, 0) if child else None"
    )
    with script_process(script) as process:
        shared = resident(process.pid)
    assert 64 < shared.anonymous_mib < 110


def test_cold_starts_are_measured_where_there_is_a_llama_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = {name: [0.2, 0.4] for name in ("llama-server, default", "llama-server, leanest")}
    taken |= {f"pilotlight, {sleep} sleep": [0.1, 0.1] for sleep in ("deep", "light")}
    monkeypatch.setattr("cold_start.measure", lambda *_: taken)
    args = argparse.Namespace(llama_server="there", threads=1, out=tmp_path / "results")
    ours, llama = FakePeer(OURS, 0.01), FakePeer("llama-server", 0.02)
    measure_cold_start(SHAPE, {ours: tmp_path / "ours"}, args)
    assert not [*tmp_path.iterdir()]
    measure_cold_start(SHAPE, {ours: tmp_path / "ours", llama: tmp_path / "gguf"}, args)
    found = json.loads((tmp_path / "results" / f"cold-start-{SHAPE.name}.json").read_text())
    assert found["ratios"]["deep / default"] == pytest.approx([0.5, 0.25])
    assert "deep / default" in capsys.readouterr().out
