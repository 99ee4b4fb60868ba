"""How a peer that is a library is asked: one JSON object a line, on the standard input and output of its own process.

    {"do": "load", "model": "DIR", "num_threads": 2, "num_slots": 8, "max_context_tokens": 512, "options": {}}
    {"versions": {"onnxruntime-genai": "0.18.0"}}
    {"do": "generate", "prompts": [[1, 2], [3, 4]], "num_tokens": 64}
    {"token_times": [[instant, ...], [instant, ...]]}

Instants are CLOCK_MONOTONIC seconds, which all processes of a machine share. A failure is answered with {"error": ...}.
This module needs nothing but the standard library: it runs in every peer's own environment.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

TokenIds = list[int]


@dataclass(frozen=True)
class Load:
    """What is to be loaded, and what it must be able to hold."""

    model: Path
    num_threads: int
    num_slots: int
    max_context_tokens: int
    options: dict[str, Any] = field(default_factory=dict)


class Generator(Protocol):
    """A loaded model."""

    def generate(self, prompts: list[TokenIds], num_tokens: int) -> list[list[float]]:
        """Extend prompts of one length, all at the same time, greedily, past any end token.

        Return the instant at which each token of each prompt was known.
        """


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of installed packages."""
    return {package: version(package) for package in packages}


def serve(load: Callable[[Load], Generator], packages: tuple[str, ...]) -> None:
    """Answer lines until the input ends. What a library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    generator: Generator | None = None
    for line in sys.stdin:
        message = json.loads(line)
        action = message.pop("do")
        try:
            if action == "load":
                generator = load(Load(**message | {"model": Path(message["model"])}))
                answer: dict[str, Any] = {"versions": versions(*packages)}
            else:
                assert generator is not None, "load comes first"
                answer = {"token_times": generator.generate(message["prompts"], message["num_tokens"])}
        except Exception as error:  # noqa: BLE001  a library may raise anything; the bench goes on with the other peers
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
