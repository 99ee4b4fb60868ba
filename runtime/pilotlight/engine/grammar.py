"""Constrained decoding: which tokens a grammar allows next, worked out on other threads than the engine's.

A grammar travels as text, llguidance's serialized form, and becomes a state only here, with a tokenizer made from the
artifact's own. A state holds nothing that its emitted tokens do not determine, so a sequence that goes on in another
process gets its state back by replaying them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pilotlight.artifact import TOKENIZER, Artifact
from pilotlight.errors import EngineError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_KEPT_GRAMMARS = 32
"""Compiled grammars are copied, which takes microseconds; compiling one takes from a millisecond to a second."""


class GrammarState:
    """Where one sequence is in its grammar."""

    def __init__(self, matcher: LLMatcher, num_known: int, vocab_size: int, stop_ids: frozenset[int]) -> None:
        """Begin with a matcher over a tokenizer of ``num_known`` tokens, for logits over ``vocab_size`` tokens."""
        self._matcher = matcher
        self._stop_ids = stop_ids
        self._vocab_size = vocab_size
        self._bits = np.zeros((num_known + 31) // 32, np.int32)
        self.banned: NDArray[np.bool_] = np.zeros(vocab_size, np.bool_)

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())

    @property
    def failure(self) -> str | None:
        """What went wrong in the matcher, a limit for instance; it stays so."""
        return str(self._matcher.get_error()) if self._matcher.is_error() else None

    def find_banned(self) -> None:
        """Work out the tokens [V] that may not come next. Takes the GIL for the smallest part of its time."""
        if self.complete:
            return
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        allowed = np.unpackbits(self._bits.view(np.uint8), count=self._vocab_size, bitorder="little")
        np.equal(allowed, 0, out=self.banned)

    def commit(self, token_id: int) -> None:
        """Go on behind a token; one that ends the answer by its id is no part of the grammar."""
        if token_id not in self._stop_ids:
            self._matcher.consume_token(token_id)


class Grammars:
    """Compiles grammars for one artifact, and works out masks. Nothing is loaded before the first grammar comes."""

    def __init__(
        self,
        tokenizer_path: Path,
        vocab_size: int,
        eos_ids: Sequence[int],
        read_tokenizer: Callable[[], bytes | memoryview] | None = None,
    ) -> None:
        self._read_tokenizer = read_tokenizer or tokenizer_path.read_bytes
        self._vocab_size = vocab_size
        self._eos_ids = list(eos_ids)
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        # One thread each: a grammar that takes long to compile must not hold up the masks of others.
        self._compiling = ThreadPoolExecutor(1, "pilotlight-grammar")
        self._masking = ThreadPoolExecutor(1, "pilotlight-mask")

    @classmethod
    def of(cls, artifact: Artifact) -> Grammars:
        manifest = artifact.manifest
        special = manifest.special_tokens
        return cls(
            artifact.tokenizer_path, manifest.shapes.vocab_size, special.eos_ids, lambda: artifact.read(TOKENIZER)
        )

    def compile(self, grammar: str, emitted_ids: Sequence[int], stop_ids: frozenset[int]) -> Future[GrammarState]:
        """Return the state of a grammar behind ``emitted_ids``, once it is compiled; EngineError where it cannot be."""
        return self._compiling.submit(self._state, grammar, emitted_ids, stop_ids)

    def find_banned(self, states: Iterable[GrammarState | None]) -> Future[None] | None:
        """Begin to work out the masks of a step; None when no sequence has a grammar."""
        constrained = [state for state in states if state is not None]
        return self._masking.submit(_find_all_banned, constrained) if constrained else None

    def close(self) -> None:
        self._compiling.shutdown(cancel_futures=True)
        self._masking.shutdown()

    def _state(self, grammar: str, emitted_ids: Sequence[int], stop_ids: frozenset[int]) -> GrammarState:
        tokenizer = self._loaded_tokenizer()
        state = GrammarState(self._matcher(grammar, tokenizer), tokenizer.vocab_size, self._vocab_size, stop_ids)
        for token_id in emitted_ids:
            state.commit(token_id)
        if state.failure is not None:
            raise EngineError(f"the grammar cannot be used: {state.failure}")
        return state

    def _matcher(self, grammar: str, tokenizer: LLTokenizer) -> LLMatcher:
        from llguidance import LLMatcher

        compiled = self._compiled.pop(grammar, None) or LLMatcher(tokenizer, grammar, log_level=0)
        self._compiled[grammar] = compiled
        while len(self._compiled) > MAX_KEPT_GRAMMARS:
            self._compiled.popitem(last=False)
        return compiled.deep_copy()

    def _loaded_tokenizer(self) -> LLTokenizer:
        if self._tokenizer is None:
            from llguidance import LLTokenizer

            content, eos = str(self._read_tokenizer(), "utf-8"), self._eos_ids or None
            try:
                self._tokenizer = LLTokenizer(content, n_vocab=self._vocab_size, eos_token=eos)
            except ValueError:  # a tokenizer with more tokens than the model has
                self._tokenizer = LLTokenizer(content, eos_token=eos)
        return self._tokenizer


def _find_all_banned(states: list[GrammarState]) -> None:
    for state in states:
        state.find_banned()
