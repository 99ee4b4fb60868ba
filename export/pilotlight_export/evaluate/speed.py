"""Speed and memory: every artifact in a process of its own, measured in turns, so that a busy moment hits all alike."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pilotlight_export.errors import EvaluationError
from pilotlight_export.evaluate.figures import Speed, spread_of
from pilotlight_export.verify.figures import rounded

NUM_ROUNDS = 7


def measure_speeds(paths: Sequence[Path], on_round: Callable[[int, int], None]) -> list[Speed]:
    """Run all artifacts in alternation; ``on_round`` is told how many rounds of how many are done.

    Raises:
        EvaluationError: an artifact cannot be loaded or run.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(_Worker(path)) for path in paths]
        for worker in workers:
            worker.read()
        rounds = []
        for num_done in range(NUM_ROUNDS):
            on_round(num_done, NUM_ROUNDS)
            rounds.append([worker.measure() for worker in workers])
    return [_speed([measured[index] for measured in rounds]) for index in range(len(paths))]


def _speed(measured: Sequence[dict[str, float]]) -> Speed:
    return Speed(
        prefill_tps=spread_of([run["prefill_tps"] for run in measured]),
        decode_tps=spread_of([run["decode_tps"] for run in measured]),
        memory_mb=rounded(measured[-1]["memory_mb"]),
    )


class _Worker:
    def __init__(self, path: Path) -> None:
        self._path = path
        command = [sys.executable, "-P", "-m", "pilotlight_export.evaluate.worker", str(path.resolve())]
        self._process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def measure(self) -> dict[str, float]:
        assert self._process.stdin is not None
        try:
            print("run", file=self._process.stdin, flush=True)
        except BrokenPipeError:
            self._fail()
        return self.read()

    def read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._fail()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _fail(self) -> None:
        _, errors = self._process.communicate()
        problem = errors.strip().splitlines()[-1] if errors.strip() else f"exit status {self._process.returncode}"
        raise EvaluationError(f"{self._path}: cannot be run ({problem})")
