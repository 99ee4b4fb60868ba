"""What a peer is to the bench: something that is prepared once, opened, and asked to generate."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from measure import Stream
from memory import Memory
from models import Shape


class PeerFailed(Exception):
    """A peer could not be prepared, opened or asked; the others go on."""


@dataclass(frozen=True)
class Setting:
    """How a model is opened, the same for every peer."""

    num_threads: int
    num_slots: int
    max_context_tokens: int


class Opened(Protocol):
    """A process that has a model loaded."""

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the packages that matter."""

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[Stream]:
        """Extend prompts of one length, sent at the same time.

        Raises:
            PeerFailed: it did not answer, or not as asked.
        """

    def peak_memory(self) -> Memory:
        """Return the most that the process has held since it started."""


class Peer(Protocol):
    """Pilotlight or another engine."""

    @property
    def name(self) -> str: ...

    @property
    def is_four_bit(self) -> bool:
        """Whether its figures count as the best peer's."""

    @property
    def is_server(self) -> bool:
        """Whether it is asked over HTTP; the others are asked through a pipe, and compared with our engine alone."""

    def missing(self) -> str | None:
        """Return what is not installed, or None."""

    def prepare(self, shape: Shape, source: Path, directory: Path) -> Path:
        """Make the model of a Hugging Face directory into this peer's own, once; return where it lies.

        Raises:
            PeerFailed: it could not be made.
        """

    def open(self, model: Path, setting: Setting) -> AbstractContextManager[Opened]:
        """Start a process and load a model; it is stopped at the end.

        Raises:
            PeerFailed: it did not become ready.
        """
