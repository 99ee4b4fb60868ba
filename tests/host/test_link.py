"""The host's end of a replica's wire."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest
import uvloop

from pilotlight.host.link import WireLink
from pilotlight.host.wire import Beat, Close, FromReplica, frame
from pilotlight.request import Signals

TIMEOUT_S = 60


NO_SIGNALS = Signals(0, 0, 1, 0, 0, 0)


class Heard:
    """What a link's listener was told."""

    def __init__(self) -> None:
        self.messages: list[FromReplica] = []
        self.causes: list[str] = []
        self.ended_at_last = asyncio.Event()

    def received(self, message: FromReplica) -> None:
        self.messages.append(message)

    def ended(self, cause: str) -> None:
        self.causes.append(cause)
        self.ended_at_last.set()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_replica_that_dies_with_messages_unread_is_lost_after_its_last_words(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def die() -> Heard:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        heard = Heard()
        link = WireLink(ours, heard, lambda: None)
        link.send(Close())
        for number in range(3):
            theirs.sendall(frame(Beat(number, NO_SIGNALS)))
        theirs.close()
        await asyncio.wait_for(heard.ended_at_last.wait(), TIMEOUT_S)
        return heard

    with asyncio.Runner(loop_factory=new_loop) as runner:
        heard = runner.run(die())
    assert [message.num_steps for message in heard.messages if isinstance(message, Beat)] == [0, 1, 2]
    assert len(heard.causes) == 1
