"""A user's text as the measure of quality: read once, cut where words end, the same pieces for every model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pilotlight_export.errors import TextError

MAX_TEXT_BYTES = 32_768
"""More text takes longer and hardly moves a mean: at a hundred tokens a second this is a minute and a half."""
SEGMENT_BYTES = 1024
SPARE_TOKENS = 16
"""A token is at least a byte, so a piece of so many bytes less than the context fits it with its special tokens."""


@dataclass(frozen=True)
class Text:
    """A text to measure on, and what a manifest says about it: a digest, never the text or its path."""

    content: str
    digest: str


def read_text(path: Path) -> Text:
    """Read a text file, of a long one its beginning.

    Raises:
        TextError: the file cannot be read, is not UTF-8 or has nothing in it.
    """
    try:
        raw = path.read_bytes()
        content = raw.decode()
    except OSError as error:
        raise TextError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: is not UTF-8 text (byte {error.start:,})") from error
    if len(content.split()) < 2:
        raise TextError(f"{path}: has no text in it")
    return Text(content.encode()[:MAX_TEXT_BYTES].decode(errors="ignore"), f"sha256:{hashlib.sha256(raw).hexdigest()}")


def split_text(text: str, max_bytes: int) -> list[str]:
    """Cut a text into pieces of at most so many bytes, behind spaces where there are any; joined they are the text."""
    pieces = []
    while text:
        piece = text.encode()[:max_bytes].decode(errors="ignore")
        if len(piece) < len(text):
            end = max(piece.rfind(" "), piece.rfind("\n")) + 1
            piece = piece[: end or len(piece)]
        pieces.append(piece)
        text = text[len(piece) :]
    return pieces
