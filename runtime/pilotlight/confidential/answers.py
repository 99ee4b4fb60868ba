"""Answers of servers that have proven nothing yet, or never will: read up to a limit, and not unpacked."""

from __future__ import annotations

from types import MappingProxyType

import httpx

PLAIN = MappingProxyType({"accept-encoding": "identity"})
"""A small packed answer may unpack to any size, so none is asked for, or taken."""


class TooLarge(httpx.HTTPError):
    """The answer is longer than it may be, or packed."""


async def read_at_most(answer: httpx.Response, max_bytes: int) -> bytes:
    """Return the body of an answer that was begun as a stream, which is closed then.

    Raises:
        TooLarge: it has more bytes, or is packed.
        httpx.HTTPError: it is cut off.
    """
    body = bytearray()
    try:
        _check_plain(answer)
        async for piece in answer.aiter_bytes():
            _extend(body, piece, max_bytes)
    finally:
        await answer.aclose()
    return bytes(body)


def read_at_most_now(answer: httpx.Response, max_bytes: int) -> bytes:
    """Do the same with an answer of a client that blocks."""
    body = bytearray()
    try:
        _check_plain(answer)
        for piece in answer.iter_bytes():
            _extend(body, piece, max_bytes)
    finally:
        answer.close()
    return bytes(body)


def _check_plain(answer: httpx.Response) -> None:
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise TooLarge("the answer is packed")


def _extend(body: bytearray, piece: bytes, max_bytes: int) -> None:
    body += piece
    if len(body) > max_bytes:
        raise TooLarge(f"the answer has more than {max_bytes:,} bytes")
