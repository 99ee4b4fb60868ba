"""Fidelity, a measurement: how close a quantized graph's predictions are to the fp32 graph's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pilotlight.artifact import Shapes
from pilotlight_export.errors import VerificationError
from pilotlight_export.verify.figures import rounded
from pilotlight_export.verify.graph_runner import GraphRunner, Logits
from pilotlight_export.verify.passages import Passage


@dataclass(frozen=True)
class Fidelity:
    """How close a quantized graph's predictions are to the fp32 graph's, over the positions of sampled answers.

    Units:
        divergences in nats
    """

    top1_agreement: float
    mean_kl: float
    p99_kl: float
    perplexity_ratio: float
    num_positions: int


@dataclass(frozen=True)
class _Comparison:
    """One answer, position by position: is the likeliest token the same, how far apart are the distributions, and how
    much less likely has the answer's own token become."""

    agreement: npt.NDArray[np.bool_]
    divergence: npt.NDArray[np.float64]
    loss: npt.NDArray[np.float64]


def measure_fidelity(expected_path: Path, graph_path: Path, shapes: Shapes, passages: Sequence[Passage]) -> Fidelity:
    """Compare a quantized graph's predictions with the fp32 graph's on sampled answers.

    Raises:
        VerificationError: a logit is not a number.
    """
    cache_tokens = max(len(passage.tokens) for passage in passages)
    expected_runner = GraphRunner(expected_path, shapes, 1, cache_tokens)
    runner = GraphRunner(graph_path, shapes, 1, cache_tokens)
    compared = [_compare(expected_runner, runner, passage) for passage in passages]
    divergences = np.concatenate([answer.divergence for answer in compared])
    if not np.isfinite(divergences).all():
        raise VerificationError("the quantized graph gives logits that are not numbers")
    return Fidelity(
        top1_agreement=rounded(np.concatenate([answer.agreement for answer in compared]).mean()),
        mean_kl=rounded(divergences.mean()),
        p99_kl=rounded(np.quantile(divergences, 0.99)),
        perplexity_ratio=rounded(np.exp(np.concatenate([answer.loss for answer in compared]).mean())),
        num_positions=len(divergences),
    )


def _compare(expected_runner: GraphRunner, runner: GraphRunner, passage: Passage) -> _Comparison:
    positions = [passage.answer_positions]
    expected = _log_softmax(expected_runner.prefill([passage.tokens], positions))
    found = _log_softmax(runner.prefill([passage.tokens], positions))
    tokens = np.array(passage.answer)[:, None]
    return _Comparison(
        agreement=expected.argmax(axis=-1) == found.argmax(axis=-1),
        divergence=(np.exp(expected) * (expected - found)).sum(axis=-1),
        loss=np.take_along_axis(expected - found, tokens, axis=-1)[:, 0],
    )


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
