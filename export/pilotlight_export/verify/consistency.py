"""Consistency, a property of any graph: it says the same in one pass and step by step, beside other rows and alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pilotlight_export.errors import VerificationError
from pilotlight_export.verify.figures import rounded
from pilotlight_export.verify.graph_runner import GraphRunner, Graphs, Logits
from pilotlight_export.verify.parity import MAX_LOGIT_DIFFERENCE
from pilotlight_export.verify.passages import Passage, decode_steps, longest_answers


@dataclass(frozen=True)
class Consistency:
    """Largest absolute differences between logits that exact arithmetic would make equal.

    Quantized kernels round a batch of one differently from a long prompt, so only fp32 graphs have to agree.
    """

    steps_max_abs_difference: float
    batch_max_abs_difference: float


def measure_consistency(graphs: Graphs, passages: Sequence[Passage]) -> Consistency:
    """Compare steps with one pass over the same tokens, and rows of a batch with the same rows alone."""
    rows, num_steps = longest_answers(passages)
    together = decode_steps(graphs, rows, num_steps)
    alone = np.concatenate([decode_steps(graphs, [row], num_steps) for row in rows], axis=1)
    whole = np.stack([_in_one_pass(graphs, row, num_steps) for row in rows], axis=1)
    return Consistency(
        steps_max_abs_difference=rounded(np.abs(alone - whole).max()),
        batch_max_abs_difference=rounded(np.abs(together - alone).max()),
    )


def check_consistency(consistency: Consistency) -> None:
    """Refuse an fp32 graph that contradicts itself.

    Raises:
        VerificationError: a logit differs by more than parity allows, or is not a number.
    """
    for way, difference in (
        ("step by step", consistency.steps_max_abs_difference),
        ("in a batch", consistency.batch_max_abs_difference),
    ):
        if not difference <= MAX_LOGIT_DIFFERENCE:
            raise VerificationError(
                f"the fp32 graph's logits {way} differ from its own by {difference:.2g}; "
                f"allowed is {MAX_LOGIT_DIFFERENCE:g}"
            )


def _in_one_pass(graphs: Graphs, row: Passage, num_steps: int) -> Logits:
    return GraphRunner(graphs, 1, len(row.tokens)).prefill([row.tokens], [row.answer_positions[:num_steps]])
