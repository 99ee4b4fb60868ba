"""Answers that the model itself gives to the built-in questions: the text on which its exports are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pilotlight.artifact import Shapes
from pilotlight_export.verify.graph_runner import GraphRunner, Logits
from pilotlight_export.verify.prompts import Prompts

MAX_QUESTION_TOKENS = 256
MAX_ANSWER_TOKENS = 48
NUM_ANSWERS_PER_QUESTION = 2
SEED = 20261122


@dataclass(frozen=True)
class Passage:
    """A question and an answer that the fp32 graph sampled to it."""

    question: list[int]
    answer: list[int]

    @property
    def tokens(self) -> list[int]:
        return self.question + self.answer

    @property
    def answer_positions(self) -> range:
        """Positions whose logits predict the answer's tokens."""
        return range(len(self.question) - 1, len(self.tokens) - 1)


def sample_passages(graph_path: Path, shapes: Shapes, prompts: Prompts, eos_ids: Sequence[int]) -> list[Passage]:
    """Sample several answers to each question, the same ones each time."""
    room = shapes.max_context_tokens
    questions = prompts.questions(min(MAX_QUESTION_TOKENS, room // 2)) * NUM_ANSWERS_PER_QUESTION
    num_steps = min(MAX_ANSWER_TOKENS, room // 2)
    runner = GraphRunner(graph_path, shapes, len(questions), max(map(len, questions)) + num_steps)
    random = np.random.default_rng(SEED)
    logits = runner.prefill(questions, [[len(question) - 1] for question in questions])
    sampled = [_sample(logits, random)]
    for _ in range(num_steps - 1):
        sampled.append(_sample(runner.decode(sampled[-1]), random))
    answers = np.stack(sampled, axis=1).tolist()
    return [Passage(q, _until_end(a, eos_ids)) for q, a in zip(questions, answers, strict=True)]


def _sample(logits: Logits, random: np.random.Generator) -> npt.NDArray[np.int64]:
    noise = random.gumbel(size=logits.shape)
    tokens: npt.NDArray[np.int64] = (logits + noise).argmax(axis=-1)
    return tokens


def _until_end(answer: list[int], eos_ids: Sequence[int]) -> list[int]:
    """Cut an answer behind its first end-of-sequence token."""
    ends = [index for index, token in enumerate(answer) if token in eos_ids]
    return answer[: ends[0] + 1] if ends else answer
