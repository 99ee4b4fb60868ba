"""What one task or callback hands to another on the same event loop, in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

from pilotlight.request import TokenEvent

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Items for one reader, who either waits for them or listens.

    Each token of each stream goes through two of these, so an ``asyncio.Queue``, which can serve many readers and
    bound its size, would be felt. A listener is called where an item is put, without a task in between; it must not
    raise.
    """

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._arrived: asyncio.Future[None] | None = None
        self._listener: Callable[[T], None] | None = None

    def put(self, item: T) -> None:
        if self._listener is not None:
            self._listener(item)
            return
        self._items.append(item)
        if self._arrived is not None:
            if not self._arrived.done():
                self._arrived.set_result(None)
            self._arrived = None

    def listen(self, listener: Callable[[T], None]) -> None:
        """Have ``listener`` called with what was put and with what will be."""
        while self._items:
            listener(self._items.popleft())
        self._listener = listener

    async def get(self) -> T:
        """Wait for the next item and take it out."""
        while not self._items:
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived
        return self._items.popleft()


class TokenStream(Mailbox[TokenEvent]):
    """A sequence's events. Iterating over it ends with the last one, which has a finish reason."""

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        event = await self.get()
        while event.finish is None:
            yield event
            event = await self.get()
        yield event
