"""Peers that are libraries: each a script in ``peers/``, run by the interpreter of the peer's own environment."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import Stream
from memory import Memory, PeakMemory
from models import Shape
from peer import Opened, PeerFailed, Setting
from servers import OUR_ENGINE, Pilotlight, cache_of, stop

SCRIPTS = Path(__file__).parent / "peers"
ANSWER_TIMEOUT_S = 300.0


class OpenedWorker:
    """A worker with a model loaded."""

    def __init__(self, process: subprocess.Popen[str], memory: PeakMemory) -> None:
        self.versions: dict[str, str] = {}
        self._process, self._memory = process, memory

    def load(self, **settings: Any) -> None:
        self.versions = self._ask({"do": "load", **settings})["versions"]

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[Stream]:
        sent_at = time.monotonic()
        times = self._ask({"do": "generate", "prompts": prompts, "num_tokens": num_tokens})["token_times"]
        if {len(row) for row in times} != {num_tokens} or len(times) != len(prompts):
            raise PeerFailed(f"{[len(row) for row in times]} tokens instead of {num_tokens} of {len(prompts)}")
        return [Stream(sent_at, row) for row in times]

    def peak_memory(self) -> Memory:
        return self._memory.peak

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timeout = threading.Timer(ANSWER_TIMEOUT_S, self._process.kill)
        timeout.start()
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError as error:
            raise PeerFailed(f"the worker is gone: {error}") from error
        finally:
            timeout.cancel()
        if not line:
            raise PeerFailed("the worker ended, or did not answer in time")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerFailed(answer["error"])
        return answer


@dataclass(eq=False)
class Worker:
    """A library, its interpreter, and how its model is made; ``prepared_as`` names it, "" takes the source itself."""

    name: str
    script: str
    python: Path | None
    prepared_as: str = ""
    prepare_options: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    is_four_bit: bool = True
    is_server = False

    def missing(self) -> str | None:
        return None if self.python else f"an environment for {self.name} (bench/README.md)"

    def prepare(self, shape: Shape, source: Path, directory: Path) -> Path:
        target = directory / f"{shape.name}-{self.prepared_as}"
        if not self.prepared_as or target.exists():
            return target if self.prepared_as else source
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        command = [*self._command(), "prepare", str(source), str(partial), *self.prepare_options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PeerFailed(f"preparing failed: {done.stderr[-500:]}")
        partial.rename(target)
        return target

    @contextmanager
    def open(self, model: Path, setting: Setting) -> Iterator[Opened]:
        pipe, silent = subprocess.PIPE, subprocess.DEVNULL
        process = subprocess.Popen(self._command(), stdin=pipe, stdout=pipe, stderr=silent, text=True)
        memory = PeakMemory(process.pid)
        try:
            opened = OpenedWorker(process, memory)
            opened.load(model=str(model.absolute()), options=self.options_for(model), **vars(setting))
            yield opened
        finally:
            memory.stop()
            stop(process)
            _close(process)

    def options_for(self, model: Path) -> dict[str, Any]:
        """Return what the script is told beside the setting."""
        return dict(self.options)

    def _command(self) -> list[str]:
        assert self.python is not None
        return [str(self.python), str(SCRIPTS / self.script)]


class OurEngine(Worker):
    """This project's engine without its server, on the artifact that the server serves."""

    def __init__(self, served: Pilotlight) -> None:
        super().__init__(OUR_ENGINE, "pilotlight_worker.py", Path(sys.executable))
        self._served = served

    def prepare(self, shape: Shape, source: Path, directory: Path) -> Path:
        return self._served.prepare(shape, source, directory)

    def options_for(self, model: Path) -> dict[str, Any]:
        return {"cache_dir": str(cache_of(model).absolute())}


def _close(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(OSError):  # what was not sent to a process that is gone
            pipe.close()
