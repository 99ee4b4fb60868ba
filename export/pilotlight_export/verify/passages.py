"""The text on which a model's exports are compared: its own answers to the built-in questions, or what a user chose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pilotlight_export.verify.graph_runner import GraphRunner, Graphs, Logits
from pilotlight_export.verify.prompts import Prompts

MAX_QUESTION_TOKENS = 256
MAX_ANSWER_TOKENS = 48
NUM_ANSWERS_PER_QUESTION = 2
MAX_ROWS = 4
MAX_STEPS = 48
SEED = 20261122


@dataclass(frozen=True)
class Passage:
    """A question and its answer, whose tokens are the ones that get compared; of plain text, all but the first."""

    question: list[int]
    answer: list[int]

    @property
    def tokens(self) -> list[int]:
        return self.question + self.answer

    @property
    def answer_positions(self) -> range:
        """Positions whose logits predict the answer's tokens."""
        return range(len(self.question) - 1, len(self.tokens) - 1)


def sample_passages(graphs: Graphs, prompts: Prompts, eos_ids: Sequence[int]) -> list[Passage]:
    """Let the fp32 graph answer each question several times, the same way each time."""
    room = graphs.shapes.max_context_tokens
    questions = prompts.questions(min(MAX_QUESTION_TOKENS, room // 2)) * NUM_ANSWERS_PER_QUESTION
    num_steps = min(MAX_ANSWER_TOKENS, room // 2)
    runner = GraphRunner(graphs, len(questions), max(map(len, questions)) + num_steps)
    random = np.random.default_rng(SEED)
    logits = runner.prefill(questions, [[len(question) - 1] for question in questions])
    sampled = [_sample(logits, random)]
    for _ in range(num_steps - 1):
        sampled.append(_sample(runner.decode(sampled[-1]), random))
    answers = np.stack(sampled, axis=1).tolist()
    return [Passage(q, _until_end(a, eos_ids)) for q, a in zip(questions, answers, strict=True)]


def text_passages(prompts: Prompts, text: str, max_context_tokens: int) -> list[Passage]:
    """Cut a text into passages that are predicted from their beginning."""
    segments = prompts.segments(text, max_context_tokens)
    return [Passage(tokens[:1], tokens[1:]) for tokens in segments if len(tokens) > 1]


def longest_answers(passages: Sequence[Passage]) -> tuple[list[Passage], int]:
    """Return the passages to be taken step by step, and how many steps all of them have."""
    rows = sorted(passages, key=lambda passage: len(passage.answer))[-MAX_ROWS:]
    return rows, min(len(rows[0].answer), MAX_STEPS)


def decode_steps(graphs: Graphs, rows: Sequence[Passage], num_steps: int) -> npt.NDArray[np.float32]:
    """Read the questions in one pass and the answers step by step, all rows at once.

    Shapes:
        output [num_steps, B, V]
    """
    runner = GraphRunner(graphs, len(rows), max(len(row.tokens) for row in rows))
    logits = [runner.prefill([row.question for row in rows], [[len(row.question) - 1] for row in rows])]
    for step in range(num_steps - 1):
        logits.append(runner.decode(np.array([row.answer[step] for row in rows])))
    return np.stack(logits)


def _sample(logits: Logits, random: np.random.Generator) -> npt.NDArray[np.int64]:
    noise = random.gumbel(size=logits.shape)
    tokens: npt.NDArray[np.int64] = (logits + noise).argmax(axis=-1)
    return tokens


def _until_end(answer: list[int], eos_ids: Sequence[int]) -> list[int]:
    """Cut an answer behind its first end-of-sequence token."""
    ends = [index for index, token in enumerate(answer) if token in eos_ids]
    return answer[: ends[0] + 1] if ends else answer
