"""The bytes that a token stands for by itself, which a decoder tells only of whole texts.

Source: the byte alphabet of GPT-2, which ``tokenizers`` calls ByteLevel; SentencePiece's ``▁`` and ``<0x0A>``.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import tokenizers

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
SPACE = "▁"


class TokenBytes:
    """Knows how a tokenizer writes bytes in its tokens."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._added: dict[int, bytes] = {token_id: token.content.encode() for token_id, token in added.items()}
        self._byte_level = "ByteLevel" in _decoder_types(tokenizer.decoder)

    def of(self, token_id: int) -> bytes:
        """Return the bytes of a token; an id outside the vocabulary has none."""
        if (added := self._added.get(token_id)) is not None:
            return added
        token: str | None = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            return bytes(_alphabet()[char] for char in token if char in _alphabet())
        if (byte := BYTE_TOKEN.fullmatch(token)) is not None:
            return bytes.fromhex(byte[1])
        return token.replace(SPACE, " ").encode()


def _decoder_types(decoder: Any) -> set[str]:
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    return {part["type"] for part in [state, *state.get("decoders", [])]}


@cache
def _alphabet() -> dict[str, int]:
    """Return the byte of each character that stands for one: printable ones for themselves, the others from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
