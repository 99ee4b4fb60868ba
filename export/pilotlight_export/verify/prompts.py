"""The text that every export is verified on: questions as users ask them, and prose for long contexts."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from pilotlight_export.errors import SourceError, first_line
from pilotlight_export.quiet import quiet
from pilotlight_export.verify.text import SEGMENT_BYTES, SPARE_TOKENS, split_text

QUESTIONS = (
    "What is 17 plus 25?",
    "What is 90 minus 34?",
    "What is 6 times 7?",
    "Convert 3 kilometres to metres.",
    "How many minutes are 4 hours?",
    "Sort these words: pear, apple, fig.",
    "Tell me a short story.",
    "Write a story about a fox and a lamp.",
    "Who are you?",
    "Explain why the sky is blue to a child.",
    "Write a Python function that adds two numbers.",
    "Translate 'good morning' into French, German and Spanish.",
)

PROSE = (
    "The keeper lit the lamp at dusk, as she had done every evening since the ferry stopped running.",
    "Nobody had asked her to. The light cost a little oil, and the oil came up the cliff on her own back.",
    "On clear nights the beam reached the far islands; in fog it ended a few steps from the door.",
    "A pilot light is a small flame that burns so that a large one can start at once.",
    "It wastes almost nothing, and it is the difference between waiting and warmth.",
    "In the spring of 1987 the town counted 1,204 people, 311 boats and one lamp.",
    "The mayor wrote the numbers into a green book, closed it, and went to look at the sea.",
    "If the wind is 5 and the tide is 3, said the old captain, then sail; if both are 8, mend your nets.",
    "Children learned the rule before they learned to read, and some of them never learned anything else.",
    "One evening a letter came. It said: the harbour will open again, and every ship will need your light.",
)


class Prompts:
    """A model's own tokenizer and chat template, applied to the built-in text.

    Raises:
        SourceError: transformers cannot load the tokenizer.
    """

    def __init__(self, model_dir: Path) -> None:
        with quiet():
            from transformers import AutoTokenizer

            load: Any = AutoTokenizer.from_pretrained
            try:
                self._tokenizer: Any = load(str(model_dir), local_files_only=True, trust_remote_code=False)
            except Exception as error:
                raise SourceError(f"transformers cannot load the tokenizer: {first_line(error)}") from error

    def questions(self, max_tokens: int) -> list[list[int]]:
        """Return each question as the model would be asked it, cut to ``max_tokens``."""
        with quiet():
            return [self._ask(question)[:max_tokens] for question in QUESTIONS]

    def prose(self, num_tokens: int) -> list[int]:
        """Return exactly ``num_tokens`` tokens of running text."""
        tokens: list[int] = []
        with quiet():
            for sentence in cycle(PROSE):
                tokens += self._tokenizer.encode(f"{sentence} ", add_special_tokens=not tokens)
                if len(tokens) >= num_tokens:
                    return tokens[:num_tokens]
        raise AssertionError("the prose never ends")

    def segments(self, text: str, max_context_tokens: int) -> list[list[int]]:
        """Return a text in pieces that fit the context, each as the model would read it from its beginning."""
        with quiet():
            pieces = split_text(text, min(SEGMENT_BYTES, max_context_tokens - SPARE_TOKENS))
            return [list(self._tokenizer.encode(piece))[:max_context_tokens] for piece in pieces]

    def _ask(self, question: str) -> list[int]:
        """Put a question as the chat template does; a base model, or a template that refuses it, gets the bare text."""
        messages = [{"role": "user", "content": question}]
        try:
            return list(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        except (ValueError, TemplateError):
            return list(self._tokenizer.encode(question))
