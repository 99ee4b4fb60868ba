"""Does the artifact compute what the model computes? Parity with PyTorch at fp32, fidelity of what is quantized.

Parity is a condition: the fused graph's logits must be those of transformers, in one pass, in chunks, and step by step
beside other rows. Fidelity is a measurement: the fp32 graph samples answers to the built-in questions, and on these
answers, which is the text that users of this model will see, the quantized graph's distributions are compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pilotlight.artifact import Shapes
from pilotlight_export.errors import VerificationError
from pilotlight_export.graph_runner import GraphRunner, Logits
from pilotlight_export.prompts import Prompts
from pilotlight_export.trace import quiet

MAX_LOGIT_DIFFERENCE = 1e-3
MAX_VERIFIED_CONTEXT_TOKENS = 2048
MAX_ANSWER_TOKENS = 48
MAX_QUESTION_TOKENS = 256
NUM_COMPARED_ROWS = 4
NUM_COMPARED_POSITIONS = 64
NUM_ANSWERS_PER_QUESTION = 4
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


@dataclass(frozen=True)
class Parity:
    """Largest absolute differences between the fp32 graph's logits and those of transformers."""

    prefill_max_abs_difference: float
    chunked_prefill_max_abs_difference: float
    batched_decode_max_abs_difference: float
    full_context_max_abs_difference: float
    full_context_tokens: int

    @property
    def largest_difference(self) -> float:
        """The largest of them all; not a number if any is not."""
        return float(np.max([value for name, value in asdict(self).items() if name.endswith("difference")]))


@dataclass(frozen=True)
class Fidelity:
    """How close a quantized graph's predictions are to the fp32 graph's, over the positions of sampled answers."""

    top1_agreement: float
    mean_kl: float
    p99_kl: float
    perplexity_ratio: float
    num_positions: int


class Reference:
    """The model as transformers runs it, in float32."""

    def __init__(self, model_dir: Path) -> None:
        with quiet():
            import torch
            from transformers import AutoModelForCausalLM

            self._model: Any = AutoModelForCausalLM.from_pretrained(
                str(model_dir), dtype=torch.float32, local_files_only=True, use_safetensors=True
            )

    def logits(self, tokens: Sequence[int], positions: Sequence[int]) -> Logits:
        """Return the logits at some positions of one text.

        Shapes:
            output [N, V]
        """
        import torch

        with quiet(), torch.inference_mode():
            output = self._model(torch.tensor([list(tokens)]), logits_to_keep=torch.tensor(list(positions)))
        logits: Logits = output.logits[0].float().numpy()
        return logits


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


def measure_parity(
    graph_path: Path, reference: Reference, shapes: Shapes, passages: Sequence[Passage], prompts: Prompts
) -> Parity:
    """Compare the fp32 graph with transformers over short and full contexts, in every way in which the runtime runs it."""
    compared = passages[: len(passages) // NUM_ANSWERS_PER_QUESTION]
    num_tokens = min(shapes.max_context_tokens, MAX_VERIFIED_CONTEXT_TOKENS)
    prose = prompts.prose(num_tokens)
    return Parity(
        prefill_max_abs_difference=_prefill_difference(graph_path, reference, shapes, compared),
        chunked_prefill_max_abs_difference=_chunked_difference(graph_path, reference, shapes, prose[: num_tokens // 2]),
        batched_decode_max_abs_difference=_decode_difference(graph_path, reference, shapes, compared),
        full_context_max_abs_difference=_full_context_difference(graph_path, reference, shapes, prose),
        full_context_tokens=num_tokens,
    )


def check_parity(parity: Parity) -> None:
    """Refuse a graph that differs from its model.

    Raises:
        VerificationError: a logit differs by more than ``MAX_LOGIT_DIFFERENCE``, or is not a number.
    """
    if not parity.largest_difference <= MAX_LOGIT_DIFFERENCE:
        raise VerificationError(
            f"the fp32 graph's logits differ from PyTorch's by {parity.largest_difference:.2g}; "
            f"allowed is {MAX_LOGIT_DIFFERENCE:g}"
        )


def measure_fidelity(expected_path: Path, graph_path: Path, shapes: Shapes, passages: Sequence[Passage]) -> Fidelity:
    """Compare a quantized graph's predictions with the fp32 graph's on sampled answers.

    Raises:
        VerificationError: a logit is not a number.
    """
    cache_tokens = max(len(passage.tokens) for passage in passages)
    expected_runner = GraphRunner(expected_path, shapes, 1, cache_tokens)
    runner = GraphRunner(graph_path, shapes, 1, cache_tokens)
    rows = [_compare(expected_runner, runner, passage) for passage in passages]
    agreements, divergences, losses = (np.concatenate(column) for column in zip(*rows, strict=True))
    if not np.isfinite(divergences).all():
        raise VerificationError("the quantized graph gives logits that are not numbers")
    return Fidelity(
        top1_agreement=_rounded(agreements.mean()),
        mean_kl=_rounded(divergences.mean()),
        p99_kl=_rounded(np.quantile(divergences, 0.99)),
        perplexity_ratio=_rounded(np.exp(losses.mean())),
        num_positions=len(agreements),
    )


def _prefill_difference(graph_path: Path, reference: Reference, shapes: Shapes, passages: Sequence[Passage]) -> float:
    runner = GraphRunner(graph_path, shapes, 1, max(len(passage.tokens) for passage in passages))
    differences = []
    for passage in passages:
        positions = range(len(passage.tokens))
        expected = reference.logits(passage.tokens, positions)
        differences.append(_difference(expected, runner.prefill([passage.tokens], [positions])))
    return max(differences)


def _chunked_difference(graph_path: Path, reference: Reference, shapes: Shapes, tokens: Sequence[int]) -> float:
    """Read a text in two chunks, the second on a cache that holds the first."""
    first_chunk = max(len(tokens) - NUM_COMPARED_POSITIONS, 1)
    runner = GraphRunner(graph_path, shapes, 1, len(tokens))
    runner.prefill([tokens[:first_chunk]], [[]])
    expected = reference.logits(tokens, range(first_chunk, len(tokens)))
    return _difference(expected, runner.extend(tokens[first_chunk:]))


def _decode_difference(graph_path: Path, reference: Reference, shapes: Shapes, passages: Sequence[Passage]) -> float:
    """Feed a few answers step by step, all rows at once, each with its own length."""
    rows = sorted(passages, key=lambda passage: len(passage.answer))[-NUM_COMPARED_ROWS:]
    num_steps = len(rows[0].answer)
    expected = [reference.logits(row.tokens, row.answer_positions[:num_steps]) for row in rows]
    runner = GraphRunner(graph_path, shapes, len(rows), max(len(row.tokens) for row in rows))
    logits = runner.prefill([row.question for row in rows], [[len(row.question) - 1] for row in rows])
    differences = []
    for step in range(num_steps):
        differences.append(_difference(np.stack([row[step] for row in expected]), logits))
        logits = runner.decode(np.array([row.answer[step] for row in rows]))
    return max(differences)


def _full_context_difference(graph_path: Path, reference: Reference, shapes: Shapes, tokens: Sequence[int]) -> float:
    positions = np.unique(np.linspace(0, len(tokens) - 1, NUM_COMPARED_POSITIONS).astype(int)).tolist()
    runner = GraphRunner(graph_path, shapes, 1, len(tokens))
    return _difference(reference.logits(tokens, positions), runner.prefill([tokens], [positions]))


def _compare(expected_runner: GraphRunner, runner: GraphRunner, passage: Passage) -> tuple[Logits, Logits, Logits]:
    """Return per position: whether the likeliest token agrees, the divergence, and how much less likely the answer is."""
    positions = [passage.answer_positions]
    expected = _log_softmax(expected_runner.prefill([passage.tokens], positions))
    found = _log_softmax(runner.prefill([passage.tokens], positions))
    agreement = (expected.argmax(axis=-1) == found.argmax(axis=-1)).astype(np.float64)
    divergence = (np.exp(expected) * (expected - found)).sum(axis=-1)
    tokens = np.array(passage.answer)[:, None]
    loss = np.take_along_axis(expected - found, tokens, axis=-1)[:, 0]
    return agreement, divergence, loss


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _sample(logits: Logits, random: np.random.Generator) -> npt.NDArray[np.int64]:
    noise = random.gumbel(size=logits.shape)
    tokens: npt.NDArray[np.int64] = (logits + noise).argmax(axis=-1)
    return tokens


def _until_end(answer: list[int], eos_ids: Sequence[int]) -> list[int]:
    """Cut an answer behind its first end-of-sequence token."""
    ends = [index for index, token in enumerate(answer) if token in eos_ids]
    return answer[: ends[0] + 1] if ends else answer


def _difference(expected: Logits, found: Logits) -> float:
    return _rounded(np.abs(expected - found).max())


def _rounded(value: float | np.floating[Any]) -> float:
    """Keep the four digits that mean something, so that manifests can be compared."""
    return float(f"{value:.4g}")
