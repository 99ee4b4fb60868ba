"""What a client asked for, whichever surface it came by."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any

from pilotlight.metering.idempotency import Claim
from pilotlight.request import Continuation
from pilotlight.text.tool_syntax import ToolUse


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked for, parsed and checked. ``messages`` or ``text`` or ``token_ids`` is the prompt.

    With messages, the answer goes on behind ``prefill``, which is part of the prompt.
    A ``grammar`` (see ``text.grammar``) holds the answer to a form; ``grammar_param`` is where a client gave it.
    With ``num_top_logprobs`` each token comes with its log probability, and so many of the likeliest ones.
    Requests of one ``tenant`` with the same ``cache_key`` reuse each other's prompts where they begin the same.
    At ``deadline_at``, a monotonic instant, the answer ends as if its length were reached, and at ``timeout_at``, which
    is the client's own wish. With ``seal``, an answer that is cut off gives a token that ``continues`` it.
    """

    id: str
    num_choices: int = 1
    num_top_logprobs: int | None = None
    messages: Items[Mapping[str, Any]] | None = None
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    prefill: str = ""
    prompt_name: str | None = None
    max_new_tokens: int | None = None
    stop_strings: tuple[str, ...] = ()
    ignore_eos: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)
    grammar: str | None = None
    grammar_param: str = "response_format"
    tools: ToolUse | None = None
    received_at: float = field(default_factory=time.monotonic)
    deadline_at: float | None = None
    timeout_at: float | None = None
    continues: Continuation | None = None
    seal: Callable[[Continuation], str] | None = None
    tenant: str | None = None
    key_id: str | None = None
    claim: Claim | None = None
    cache_key: str | None = None

    @property
    def prompt_param(self) -> str:
        """The name of the parameter that a client would have to change."""
        return self.prompt_name or ("messages" if self.messages is not None else "prompt")

    @property
    def is_paid(self) -> bool:
        """Whether it goes on with an answer that was begun, and whose prompt was paid for, elsewhere."""
        return self.continues is not None and self.continues.paid

    def num_known_tokens(self, prompt_ids: Items[int]) -> int:
        """Return how many tokens stand before the first new one: the prompt, and what a continuation goes on behind."""
        return len(prompt_ids) + (0 if self.continues is None else len(self.continues.emitted_ids))

    def num_new_prompt_tokens(self, prompt_ids: Items[int]) -> int:
        """Return how many tokens are billed as a prompt: none, where the answer was begun and paid for elsewhere."""
        return 0 if self.is_paid else self.num_known_tokens(prompt_ids)
