"""The bytes of single tokens: together they are the bytes of the text."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from pilotlight.text.tokenizer import Tokenizer


def joined(tokenizer: Tokenizer, text: str) -> bytes:
    return b"".join(tokenizer.token_bytes(token_id) for token_id in tokenizer.encode_rendered(text))


@given(text=st.text())
def test_byte_level_tokens_add_up_to_the_text(byte_level: Tokenizer, text: str) -> None:
    assert joined(byte_level, text) == text.encode()


def test_half_a_character_is_its_bytes(byte_level: Tokenizer) -> None:
    ids = byte_level.encode_rendered(" 🎈")
    assert len(ids) > 1
    assert next(byte_level.token_bytes(token_id) for token_id in ids) == b" \xf0\x9f"


def test_byte_fallback_tokens_are_words_and_bytes(byte_fallback: Tokenizer) -> None:
    assert byte_fallback.token_bytes(2 + 0x41) == b"A"
    assert byte_fallback.token_bytes(2 + 256 + 1) == b" he"
    assert byte_fallback.token_bytes(1) == b"<s>"


def test_added_tokens_are_their_text_and_unknown_ids_nothing(byte_level: Tokenizer) -> None:
    (tool,) = byte_level.encode_rendered("<tool>")
    assert byte_level.token_bytes(tool) == b"<tool>"
    assert byte_level.token_bytes(10**6) == b""


def test_a_real_tokenizer(phi3_path: Path) -> None:
    tokenizer = Tokenizer(phi3_path)
    assert joined(tokenizer, "Grüße, 世界 🎈\n") in (" Grüße, 世界 🎈\n".encode(), "Grüße, 世界 🎈\n".encode())
