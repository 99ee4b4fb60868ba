"""What host, zygote and replicas say to each other: frames of msgpack over Unix sockets.

A frame is four bytes of length (little-endian) and one message. Token ids travel, never text, and one frame carries all
events of one step. Source: docs/decisions/0009-replicas-are-forked.md.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
from collections.abc import Iterator

import msgspec

from pilotlight.artifact import Grant
from pilotlight.engine.policy import Policy
from pilotlight.engine.prefix_keys import PrefixChanges
from pilotlight.request import Sequence, Signals, TokenEvent

MAX_FRAME_BYTES = 64 * 1024 * 1024
READ_BYTES = 256 * 1024
_LENGTH = struct.Struct("<I")


class Stages(msgspec.Struct, array_like=True, frozen=True):
    """How long each stage of a replica's start took; together they are the time from the wish to the ready replica.

    ``fork_ms`` also holds the message to the zygote; ``map_ms`` is the artifact's manifest and files, ``unseal_ms`` the
    decryption of a sealed one, ``session_ms`` ONNX Runtime and the KV cache. ``origin`` is what the replica was forked
    from: ``zygote`` or ``template``.
    """

    origin: str = "zygote"
    fork_ms: float = 0.0
    map_ms: float = 0.0
    session_ms: float = 0.0
    warm_up_ms: float = 0.0
    unseal_ms: float = 0.0


class ReplicaSpec(msgspec.Struct, array_like=True, frozen=True):
    """All that a replica has to know. ``asked_at`` is a monotonic instant; ``grant`` opens a sealed artifact."""

    replica_id: str
    artifact: str
    num_slots: int
    max_context_tokens: int
    policy: Policy
    num_threads: int
    cache_dir: str | None
    asked_at: float
    num_warm_up_tokens: int = 0
    grant: Grant | None = None


class Submit(msgspec.Struct, array_like=True, tag=0, frozen=True):
    sequence: Sequence


class Abort(msgspec.Struct, array_like=True, tag=1, frozen=True):
    sequence_id: str


class Close(msgspec.Struct, array_like=True, tag=2, frozen=True):
    """End every sequence as cancelled, then the process."""


class Started(msgspec.Struct, array_like=True, tag=0, frozen=True):
    """The replica takes sequences from now on."""

    pid: int
    stages: Stages


class Failed(msgspec.Struct, array_like=True, tag=1, frozen=True):
    """The replica could not start, and would not the next time either."""

    problem: str


class Step(msgspec.Struct, array_like=True, tag=2, frozen=True):
    """One step's events, the load after it, and which prompt beginnings came and went since the one before."""

    events: list[tuple[str, TokenEvent]]
    signals: Signals
    prefixes: PrefixChanges = {}


class Beat(msgspec.Struct, array_like=True, tag=3, frozen=True):
    """A sign of life, once a second. The engine is alive, too, where ``num_steps`` grows."""

    num_steps: int
    signals: Signals


class ForkReplica(msgspec.Struct, array_like=True, tag=0, frozen=True):
    """Comes with the replica's end of its wire."""

    spec: ReplicaSpec


class ForkTemplate(msgspec.Struct, array_like=True, tag=1, frozen=True):
    """Comes with the template's end of a socket that takes ``ForkReplica``."""

    spec: ReplicaSpec


class Forked(msgspec.Struct, array_like=True, tag=0, frozen=True):
    replica_id: str
    pid: int


class Exited(msgspec.Struct, array_like=True, tag=1, frozen=True):
    """A child ended; ``exit_code`` is negative for a signal."""

    pid: int
    exit_code: int


class Dormant(msgspec.Struct, array_like=True, tag=2, frozen=True):
    """A template holds its session now and waits."""

    pid: int
    stages: Stages


class Unfit(msgspec.Struct, array_like=True, tag=3, frozen=True):
    """A template could not be made."""

    problem: str


ToReplica = Submit | Abort | Close
FromReplica = Started | Failed | Step | Beat
ToZygote = ForkReplica | ForkTemplate
FromZygote = Forked | Exited | Dormant | Unfit

to_replica = msgspec.msgpack.Decoder(ToReplica)
from_replica = msgspec.msgpack.Decoder(FromReplica)
to_zygote = msgspec.msgpack.Decoder(ToZygote)
from_zygote = msgspec.msgpack.Decoder(FromZygote)
_encoder = msgspec.msgpack.Encoder()


def encode(message: object) -> bytes:
    """Return a message without a frame, for sockets that keep messages apart."""
    return _encoder.encode(message)


def frame(message: object) -> bytes:
    """Return a message as it goes over a stream."""
    payload = _encoder.encode(message)
    return _LENGTH.pack(len(payload)) + payload


class FrameReader:
    """Cuts a byte stream into the payloads of its frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, received: bytes) -> Iterator[bytes]:
        """Take bytes in and yield every payload that is complete.

        Raises:
            ValueError: a frame is longer than any message can be.
        """
        self._buffer += received
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length:,} bytes")
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            yield bytes(self._buffer[start + _LENGTH.size : end])
            start = end
        del self._buffer[:start]


class BlockingWire:
    """A replica's end: one thread reads, any thread sends."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = FrameReader()
        self._sending = threading.Lock()

    def send(self, message: FromReplica) -> None:
        """Send one message; waits while the host is slow to read.

        Raises:
            OSError: the host is gone.
        """
        encoded = frame(message)
        with self._sending:
            self._connection.sendall(encoded)

    def receive(self, timeout_s: float) -> list[ToReplica] | None:
        """Return the messages that arrived, none after ``timeout_s`` without one, or None when the host is gone."""
        if not select.select([self._connection], [], [], timeout_s)[0]:
            return []
        try:
            received = self._connection.recv(READ_BYTES)
        except OSError:
            return None
        return [to_replica.decode(payload) for payload in self._reader.feed(received)] if received else None
