"""Parity, a condition of every export: the fused fp32 graph's logits are those of transformers.

They are compared in one pass, in chunks, over the full context, and step by step beside other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from pilotlight_export.errors import VerificationError
from pilotlight_export.verify.figures import rounded
from pilotlight_export.verify.graph_runner import GraphRunner, Graphs, Logits
from pilotlight_export.verify.passages import Passage, decode_steps, longest_answers
from pilotlight_export.verify.prompts import Prompts
from pilotlight_export.verify.reference import Reference
from pilotlight_export.verify.windows import longest_window_tokens

MAX_LOGIT_DIFFERENCE = 1e-3
MAX_CONTEXT_TOKENS = 2048
MAX_WINDOWED_TOKENS = 8192
"""Texts go beyond a model's sliding windows up to this length: attention in PyTorch costs its square."""

NUM_COMPARED_PASSAGES = 12
NUM_COMPARED_POSITIONS = 64


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


def measure_parity(graphs: Graphs, reference: Reference, passages: Sequence[Passage], prompts: Prompts) -> Parity:
    """Compare the fp32 graph with transformers in every way in which the runtime runs it, up to the full context."""
    compared = passages[:NUM_COMPARED_PASSAGES]
    beyond_windows = min(longest_window_tokens(graphs.directory) + NUM_COMPARED_POSITIONS, MAX_WINDOWED_TOKENS)
    num_tokens = min(graphs.shapes.max_context_tokens, max(MAX_CONTEXT_TOKENS, beyond_windows))
    prose = prompts.prose(num_tokens)
    chunked = prose[: max(num_tokens // 2, beyond_windows)]
    return Parity(
        prefill_max_abs_difference=_prefill_difference(graphs, reference, compared),
        chunked_prefill_max_abs_difference=_chunked_difference(graphs, reference, chunked),
        batched_decode_max_abs_difference=_decode_difference(graphs, reference, compared),
        full_context_max_abs_difference=_full_context_difference(graphs, reference, prose),
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


def _prefill_difference(graphs: Graphs, reference: Reference, passages: Sequence[Passage]) -> float:
    runner = GraphRunner(graphs, 1, max(len(passage.tokens) for passage in passages))
    differences = []
    for passage in passages:
        positions = range(len(passage.tokens))
        expected = reference.logits(passage.tokens, positions)
        differences.append(_difference(expected, runner.prefill([passage.tokens], [positions])))
    return float(np.max(differences))


def _chunked_difference(graphs: Graphs, reference: Reference, tokens: Sequence[int]) -> float:
    """Read a text in two chunks, the second on a cache that holds the first."""
    first_chunk = max(len(tokens) - NUM_COMPARED_POSITIONS, 1)
    runner = GraphRunner(graphs, 1, len(tokens))
    runner.prefill([tokens[:first_chunk]], [[]])
    expected = reference.logits(tokens, range(first_chunk, len(tokens)))
    return _difference(expected, runner.extend(tokens[first_chunk:]))


def _decode_difference(graphs: Graphs, reference: Reference, passages: Sequence[Passage]) -> float:
    """Feed a few answers step by step, all rows at once, each with its own length."""
    rows, num_steps = longest_answers(passages)
    expected = [reference.logits(row.tokens, row.answer_positions[:num_steps]) for row in rows]
    return _difference(np.stack(expected, axis=1), decode_steps(graphs, rows, num_steps))


def _full_context_difference(graphs: Graphs, reference: Reference, tokens: Sequence[int]) -> float:
    positions = np.unique(np.linspace(0, len(tokens) - 1, NUM_COMPARED_POSITIONS).astype(int)).tolist()
    runner = GraphRunner(graphs, 1, len(tokens))
    return _difference(reference.logits(tokens, positions), runner.prefill([tokens], [positions]))


def _difference(expected: Logits, found: Logits) -> float:
    return rounded(np.abs(expected - found).max())
