"""What of a function deals in texts: from a request to sequences of tokens, and from their tokens back to text."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from pilotlight.answer import ChoiceStream
from pilotlight.artifact import GENERATION_CONFIG, Artifact
from pilotlight.errors import ArtifactError, ContextLengthExceeded, InvalidRequest
from pilotlight.function.request import Request
from pilotlight.request import SamplingParams, Sequence
from pilotlight.text.chat_template import ChatTemplate, load_chat_template
from pilotlight.text.detokenizer import TextStream
from pilotlight.text.grammar import check_grammar
from pilotlight.text.reasoning import ReasoningCount, ThinkMarkers
from pilotlight.text.tokenizer import Tokenizer
from pilotlight.text.tool_calls import ToolCallParser

MAX_INLINE_CHARACTERS = 4096
"""Longer texts are tokenized on another thread, so that they don't hold up the streams of others."""


@dataclass(frozen=True, slots=True)
class Texts:
    """How an artifact's texts become tokens: what of a function needs neither a ledger nor a backend."""

    tokenizer: Tokenizer
    template: ChatTemplate

    @classmethod
    def of(cls, artifact: Artifact) -> Texts:
        """Load them.

        Raises:
            ArtifactError: a file of the artifact cannot be read as what it should be.
        """
        tokenizer = Tokenizer.of(artifact)
        special_tokens = artifact.manifest.special_tokens
        return cls(tokenizer, load_chat_template(artifact, tokenizer.special_texts(special_tokens)))


class TextSide:
    """An artifact's tokenizer, template and sampling defaults, with the limits of the function that serves it."""

    def __init__(
        self, artifact: Artifact, texts: Texts | None, max_context_tokens: int, max_answer_tokens: int | None
    ) -> None:
        texts = texts or Texts.of(artifact)
        self.tokenizer, self._template = texts.tokenizer, texts.template
        self._default_sampling = _default_sampling(artifact)
        self._stop_ids = frozenset(artifact.manifest.special_tokens.eos_ids)
        self._think_markers = ThinkMarkers.of(self.tokenizer, self._stop_ids)
        self._vocab_size = artifact.manifest.shapes.vocab_size
        self._max_context_tokens = max_context_tokens
        self._max_answer_tokens = max_answer_tokens

    async def read(self, request: Request) -> tuple[Request, list[Sequence], list[ChoiceStream]]:
        """Return the request with the grammar that it implies, a sequence for each choice, and what reads its tokens.

        Raises:
            InvalidRequest: the prompt or a parameter is not acceptable for this function.
            ContextLengthExceeded: the prompt leaves no room for an answer.
        """
        prompt_ids = await self.prompt_ids(request)
        request = self._with_forced_calls(request)
        if request.grammar is not None:
            await _check_grammar(request, request.grammar)
        sequences = self._sequences(request, prompt_ids)
        return request, sequences, await self._streams(request, sequences)

    async def prompt_ids(self, request: Request) -> tuple[int, ...]:
        """Return the tokens of a request's prompt.

        Raises:
            InvalidRequest: the prompt is not acceptable for this function.
        """
        if request.token_ids is not None:
            return self._checked_ids(request.token_ids)
        if request.messages is not None:
            tools = request.tools.offered if request.tools is not None else ()
            of_tools = [tool.for_template() for tool in tools] or None
            text = self._template.render(request.messages, of_tools) + request.prefill
            encode = self.tokenizer.encode_rendered
        else:
            text = request.text or ""
            encode = self.tokenizer.encode_prompt
        token_ids = encode(text) if len(text) <= MAX_INLINE_CHARACTERS else await asyncio.to_thread(encode, text)
        if not token_ids:
            raise InvalidRequest(request.prompt_param, "the prompt is empty")
        return tuple(token_ids)

    def _with_forced_calls(self, request: Request) -> Request:
        """Return the request with the grammar of its tool calls, where it demands one or has another grammar beside."""
        use = request.tools
        if use is None or use.choice == "none" or (use.choice == "auto" and request.grammar is None):
            return request
        syntax = self._template.tool_syntax
        special_ids = self.tokenizer.special_ids_of(syntax.markers)
        if use.choice == "required" or request.grammar is None:
            return replace(request, grammar=syntax.forced_grammar(use, special_ids), grammar_param="tools")
        beside = syntax.grammar_beside(request.grammar, use, special_ids)
        if beside is None:
            raise InvalidRequest(request.grammar_param, f"{request.grammar_param}: only JSON can go with tools")
        return replace(request, grammar=beside)

    def _sequences(self, request: Request, prompt_ids: tuple[int, ...]) -> list[Sequence]:
        """Return one sequence a choice; each draws its own random numbers, the first one those of the seed itself."""
        first = self._sequence(request, prompt_ids)
        others = [
            replace(first, id=f"{first.id}#{index}", sampling=replace(first.sampling, seed=first.sampling.seed + index))
            for index in range(1, request.num_choices)
        ]
        return [first, *others]

    async def _streams(self, request: Request, sequences: Items[Sequence]) -> list[ChoiceStream]:
        """Return what turns each sequence's tokens into text again; a continuation's is where it was cut off."""
        streams = [
            ChoiceStream(
                index,
                sequence.id,
                sequence.stop_ids,
                self._text_stream(request),
                self._call_parser(request),
                self._reasoning_count(sequence),
            )
            for index, sequence in enumerate(sequences)
        ]
        if request.continues is not None:
            await asyncio.to_thread(streams[0].replay, request.continues.emitted_ids, self.tokenizer)
        return streams

    def _text_stream(self, request: Request) -> TextStream:
        if request.tools is None or not request.tools.offered:
            return TextStream(self.tokenizer, request.stop_strings)
        special_ids = self.tokenizer.special_ids_of(self._template.tool_syntax.markers)
        shown = {token_id: text for text, token_id in special_ids.items()}
        return TextStream(self.tokenizer, request.stop_strings, shown)

    def _call_parser(self, request: Request) -> ToolCallParser | None:
        if request.tools is None or not request.tools.offered:
            return None
        return ToolCallParser(self._template.tool_syntax, request.tools.names)

    def _reasoning_count(self, sequence: Sequence) -> ReasoningCount | None:
        if self._think_markers is None:
            return None
        return ReasoningCount(self._think_markers, sequence.prompt_ids + sequence.emitted_ids)

    def _checked_ids(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        vocab_size = self._vocab_size
        if not token_ids:
            raise InvalidRequest("prompt", "the prompt is empty")
        if not all(0 <= token_id < vocab_size for token_id in token_ids):
            raise InvalidRequest("prompt", f"token ids must lie between 0 and {vocab_size - 1}")
        return token_ids

    def _sequence(self, request: Request, prompt_ids: tuple[int, ...]) -> Sequence:
        room = self._max_context_tokens - len(prompt_ids)
        if room < 1:
            raise ContextLengthExceeded(len(prompt_ids), self._max_context_tokens, request.prompt_param)
        sampling = SamplingParams(**{"seed": secrets.randbits(63), **self._default_sampling, **request.sampling})
        beyond = [token_id for token_id in sampling.logit_bias if token_id >= self._vocab_size]
        if beyond:
            raise InvalidRequest("logit_bias", f"logit_bias names token {beyond[0]}, which is not in the vocabulary")
        max_new_tokens = min(request.max_new_tokens or room, self._max_answer_tokens or room, room)
        emitted_ids: tuple[int, ...] = ()
        if request.continues is not None:
            emitted_ids, sampling = request.continues.emitted_ids, replace(sampling, seed=request.continues.seed)
            if len(emitted_ids) >= max_new_tokens:
                raise InvalidRequest("resume_token", "resume_token: the context here holds no more of this answer")
        return Sequence(
            id=request.id,
            prompt_ids=prompt_ids,
            max_new_tokens=max_new_tokens,
            stop_ids=frozenset() if request.ignore_eos else self._stop_ids,
            sampling=sampling,
            num_top_logprobs=request.num_top_logprobs,
            emitted_ids=emitted_ids,
            tenant=request.tenant,
            grammar=request.grammar,
            cache_key=request.cache_key,
        )


async def _check_grammar(request: Request, grammar: str) -> None:
    if request.ignore_eos:
        raise InvalidRequest("ignore_eos", f"ignore_eos cannot be combined with {request.grammar_param}")
    await asyncio.to_thread(check_grammar, grammar, request.grammar_param)


def _default_sampling(artifact: Artifact) -> dict[str, Any]:
    """Read the sampling defaults that the model's authors recommend; ``do_sample: false`` means greedy."""
    path = artifact.path / GENERATION_CONFIG
    try:
        config = msgspec.json.decode(artifact.optional_text(GENERATION_CONFIG) or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(path, f"is not a generation config ({error})") from error
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    defaults = {name: config[name] for name in names if config.get(name) is not None}
    if config.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return defaults
