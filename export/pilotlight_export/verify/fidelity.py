"""Fidelity, a measurement: how close an artifact's predictions are to those of a more precise one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pilotlight_export.errors import VerificationError
from pilotlight_export.verify.figures import rounded
from pilotlight_export.verify.graph_runner import GraphRunner, Graphs, Logits
from pilotlight_export.verify.passages import Passage, decode_steps, longest_answers

ROWS_AT_ONCE = 32
MAX_MEAN_KL = 1.0
"""In nats. Beyond it a model says something else, whatever its user would accept."""


@dataclass(frozen=True)
class Fidelity:
    """How close an artifact's predictions are to the fp32 graph's, over the positions of all passages.

    ``decode_mean_kl`` is that of a few passages taken step by step, in a batch and alone; the others are of one pass.

    Units:
        divergences in nats
    """

    top1_agreement: float
    mean_kl: float
    p99_kl: float
    perplexity_ratio: float
    decode_mean_kl: float
    num_positions: int


@dataclass(frozen=True)
class Comparison:
    """Position by position: is the likeliest token the same, how far apart are the distributions, and how unlikely is
    the text's own token to either.

    Units:
        nats
    """

    agreement: npt.NDArray[np.bool_]
    divergence: npt.NDArray[np.float64]
    expected_loss: npt.NDArray[np.float64]
    loss: npt.NDArray[np.float64]


def measure_fidelity(expected: Graphs, graphs: Graphs, passages: Sequence[Passage]) -> Fidelity:
    """Compare an artifact's predictions with the fp32 graph's.

    Raises:
        VerificationError: a logit is not a number.
    """
    compared = joined([compare_passage(expected, graphs, passage) for passage in passages])
    steps = _compare_steps(expected, graphs, passages)
    if not (np.isfinite(compared.divergence).all() and np.isfinite(steps.divergence).all()):
        raise VerificationError("the artifact's logits are not all numbers")
    return Fidelity(
        top1_agreement=rounded(compared.agreement.mean()),
        mean_kl=rounded(compared.divergence.mean()),
        p99_kl=rounded(np.quantile(compared.divergence, 0.99)),
        perplexity_ratio=rounded(np.exp((compared.loss - compared.expected_loss).mean())),
        decode_mean_kl=rounded(steps.divergence.mean()),
        num_positions=len(compared.divergence),
    )


def check_fidelity(fidelity: Fidelity, max_kl: float | None) -> None:
    """Refuse an artifact whose predictions are too far off.

    Raises:
        VerificationError: the mean divergence, in one pass or step by step, is above ``max_kl``.
    """
    limit = MAX_MEAN_KL if max_kl is None else max_kl
    for way, divergence in (("", fidelity.mean_kl), (" step by step", fidelity.decode_mean_kl)):
        if divergence > limit:
            raise VerificationError(
                f"the predictions{way} diverge from fp32 by a mean KL of {divergence:.4g}; allowed is {limit:g}"
            )


def compare_passage(expected: Graphs, graphs: Graphs, passage: Passage) -> Comparison:
    """Compare two artifacts' predictions of one passage, in one pass."""
    return _compare(_predict(expected, passage), _predict(graphs, passage), passage.answer)


def joined(comparisons: Sequence[Comparison]) -> Comparison:
    """Return several comparisons as one."""
    return Comparison(
        agreement=np.concatenate([comparison.agreement for comparison in comparisons]),
        divergence=np.concatenate([comparison.divergence for comparison in comparisons]),
        expected_loss=np.concatenate([comparison.expected_loss for comparison in comparisons]),
        loss=np.concatenate([comparison.loss for comparison in comparisons]),
    )


def _compare_steps(expected: Graphs, graphs: Graphs, passages: Sequence[Passage]) -> Comparison:
    rows, num_steps = longest_answers(passages)
    together = decode_steps(graphs, rows, num_steps)
    compared = []
    for index, row in enumerate(rows):
        likely, answer = _predict(expected, row)[:num_steps], row.answer[:num_steps]
        alone = decode_steps(graphs, [row], num_steps)[:, 0]
        compared += [_compare(likely, together[:, index], answer), _compare(likely, alone, answer)]
    return joined(compared)


def _predict(graphs: Graphs, passage: Passage) -> Logits:
    return GraphRunner(graphs, 1, len(passage.tokens)).prefill([passage.tokens], [passage.answer_positions])


def _compare(expected: Logits, found: Logits, tokens: Sequence[int]) -> Comparison:
    """Compare logits a few positions at a time: a vocabulary in float64 is large."""
    return joined([_compare_rows(expected[rows], found[rows], tokens[rows]) for rows in _row_groups(len(tokens))])


def _compare_rows(expected_logits: Logits, found_logits: Logits, tokens: Sequence[int]) -> Comparison:
    expected, found = _log_softmax(expected_logits), _log_softmax(found_logits)
    places = np.array(tokens)[:, None]
    return Comparison(
        agreement=expected.argmax(axis=-1) == found.argmax(axis=-1),
        divergence=(np.exp(expected) * (expected - found)).sum(axis=-1),
        expected_loss=-np.take_along_axis(expected, places, axis=-1)[:, 0],
        loss=-np.take_along_axis(found, places, axis=-1)[:, 0],
    )


def _row_groups(num_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, ROWS_AT_ONCE):
        yield slice(start, start + ROWS_AT_ONCE)


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
