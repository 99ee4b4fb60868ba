"""Text to token ids and back, by the ``tokenizer.json`` of an artifact."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import tokenizers

from pilotlight.artifact import TOKENIZER, Artifact, SpecialTokens
from pilotlight.errors import ArtifactError, InvalidRequest
from pilotlight.text.token_bytes import TokenBytes

MAX_REMEMBERED_TEXTS = 4096


class Tokenizer:
    """An artifact's tokenizer. Encoding releases the GIL, so a long text can be encoded in a thread."""

    def __init__(self, path: Path, content: bytes | memoryview | None = None) -> None:
        """Load a ``tokenizer.json``, or the ``content`` of one that is not on the disk.

        Raises:
            ArtifactError: the file is missing or is not a tokenizer.
        """
        self._tokenizer = _load(path, content)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._remembered = lru_cache(MAX_REMEMBERED_TEXTS)(self.decode)

    @classmethod
    def of(cls, artifact: Artifact) -> Tokenizer:
        return cls(artifact.tokenizer_path, None if artifact.contents is None else artifact.read(TOKENIZER))

    @property
    def vocab_size(self) -> int:
        """The number of token ids, added tokens included; a model's embedding may be larger."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a bare prompt, with the special tokens that the tokenizer puts around a text.

        Raises:
            InvalidRequest: the text holds half of a surrogate pair.
        """
        ids: list[int] = self._tokenizer.encode(_encodable(text, "prompt"), add_special_tokens=True).ids
        return ids

    def encode_rendered(self, text: str) -> list[int]:
        """Return the ids of a rendered chat template, which holds its special tokens already: none is added.

        Raises:
            InvalidRequest: the text holds half of a surrogate pair.
        """
        ids: list[int] = self._tokenizer.encode(_encodable(text, "messages"), add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without special tokens; ids outside the vocabulary have no text."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def text_of(self, ids: tuple[int, ...]) -> str:
        """Return the text of a few ids that come often; see ``decode``."""
        return self._remembered(ids)

    def id_of(self, text: str) -> int | None:
        """Return the id of a text that is one token, or None."""
        token_id: int | None = self._tokenizer.token_to_id(text)
        return token_id

    def special_ids_of(self, texts: Iterable[str]) -> dict[str, int]:
        """Return the ids of those texts that are special tokens."""
        ids = {text: self._tokenizer.token_to_id(text) for text in texts}
        return {text: token_id for text, token_id in ids.items() if token_id in self.special_ids}

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token by itself; an id outside the vocabulary has none."""
        return self._token_bytes.of(token_id)

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self._tokenizer)

    def special_texts(self, special: SpecialTokens) -> dict[str, str]:
        """Return ``bos_token``, ``eos_token`` and ``pad_token`` as a chat template names them, where there are any.

        The first of several end tokens is the one called ``eos_token``.
        """
        ids = {"bos_token": special.bos_id, "eos_token": next(iter(special.eos_ids), None), "pad_token": special.pad_id}
        texts = {name: self._tokenizer.id_to_token(token_id) for name, token_id in ids.items() if token_id is not None}
        return {name: text for name, text in texts.items() if text is not None}


def _load(path: Path, content: bytes | memoryview | None) -> tokenizers.Tokenizer:
    if content is None and not path.is_file():
        raise ArtifactError(path, "is missing")
    try:
        if content is None:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        else:
            tokenizer = tokenizers.Tokenizer.from_buffer(bytes(content))
    except Exception as error:  # tokenizers raises a bare Exception for every bad file
        raise ArtifactError(path, f"is not a tokenizer ({error})") from error
    # A tokenizer is often saved with the truncation and padding of its training.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _encodable(text: str, param: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(param, f"is not valid Unicode: half of a surrogate pair at {error.start}") from error
    return text
