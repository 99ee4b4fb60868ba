"""Log probabilities as chat completions and text completions write them."""

from __future__ import annotations

from collections.abc import Sequence

from pilotlight.answer import Logprobs, ScoredToken
from pilotlight.api.openai_types import TextLogprobs, TokenLogprobs, TokenScore


def chat_logprobs(tokens: Sequence[Logprobs]) -> list[TokenLogprobs]:
    """Return what the ``logprobs`` of a chat choice have as their content."""
    return [
        TokenLogprobs(
            each.token.text, each.token.logprob, list(each.token.bytes), [_score(other) for other in each.top]
        )
        for each in tokens
    ]


def text_logprobs(tokens: Sequence[Logprobs], offset: int = 0) -> TextLogprobs:
    """Return the ``logprobs`` of a text choice, whose first token begins at the character ``offset`` of the answer.

    The likeliest tokens are a mapping there, so two with the same text (broken characters, say) count as one.
    """
    texts = [each.token.text for each in tokens]
    return TextLogprobs(
        tokens=texts,
        token_logprobs=[each.token.logprob for each in tokens],
        top_logprobs=[{other.text: other.logprob for other in reversed(each.top)} for each in tokens],
        text_offset=[offset + sum(map(len, texts[:place])) for place in range(len(texts))],
    )


def _score(token: ScoredToken) -> TokenScore:
    return TokenScore(token.text, token.logprob, list(token.bytes))
