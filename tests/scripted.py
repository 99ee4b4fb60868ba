"""A model that says what a test wants it to say, and a template whose family writes tool calls as Hermes does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pilotlight.engine.fake import FakeSession
from pilotlight.engine.pace import DecodeGraph
from pilotlight.engine.session import Logits
from support import CHATML, EOS_ID, VOCAB_SIZE, toy_tokenizer

HERMES = CHATML + "{% if tools %}{{ tools | tojson }} <tool_call>{% endif %}"


class Scripted(FakeSession):
    """Writes one text after any prompt, and then ends.

    Where an answer is continued, only ``num_prompt_tokens`` tells where it began.
    """

    def __init__(
        self, text: str, before_run: Callable[[], object] = lambda: None, num_prompt_tokens: int | None = None
    ) -> None:
        super().__init__(VOCAB_SIZE, max_context_tokens=2048, before_run=before_run)
        self._num_prompt_tokens = num_prompt_tokens
        self._script = [*toy_tokenizer().encode(text).ids, EOS_ID]
        self._starts: dict[int, int] = {}

    def prefill(self, slot: int, token_ids: Any, past_tokens: int) -> Logits:
        super().prefill(slot, token_ids, past_tokens)
        self._starts[slot] = self._num_prompt_tokens or past_tokens + len(token_ids)
        return self._written([slot])

    def decode(self, token_ids: Any, past_tokens: Any, graph: DecodeGraph = DecodeGraph.MAIN) -> Logits:
        super().decode(token_ids, past_tokens, graph)
        return self._written(list(range(len(token_ids))))

    def _written(self, slots: list[int]) -> Logits:
        logits = np.zeros((len(slots), VOCAB_SIZE), np.float32)
        for row, slot in enumerate(slots):
            place = max(0, min(len(self.slots[slot]) - self._starts[slot], len(self._script) - 1))
            logits[row, self._script[place]] = 100.0
        return logits
