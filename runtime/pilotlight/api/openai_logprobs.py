"""Log probabilities as chat completions and text completions write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pilotlight.answer import Logprobs, ScoredToken


def chat_logprobs(tokens: Sequence[Logprobs]) -> dict[str, Any]:
    """Return the ``logprobs`` of a chat choice."""
    content = [{**_scored(each.token), "top_logprobs": [_scored(other) for other in each.top]} for each in tokens]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: Sequence[Logprobs], offset: int = 0) -> dict[str, Any]:
    """Return the ``logprobs`` of a text choice, whose first token begins at the character ``offset`` of the answer.

    The likeliest tokens are a mapping there, so two with the same text (broken characters, say) count as one.
    """
    texts = [each.token.text for each in tokens]
    starts = [offset + sum(map(len, texts[:place])) for place in range(len(texts))]
    return {
        "tokens": texts,
        "token_logprobs": [each.token.logprob for each in tokens],
        "top_logprobs": [{other.text: other.logprob for other in reversed(each.top)} for each in tokens],
        "text_offset": starts,
    }


def _scored(token: ScoredToken) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.bytes)}
