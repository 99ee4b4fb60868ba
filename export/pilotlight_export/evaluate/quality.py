"""Quality: how well artifacts predict a text, and how closely they follow the most precise one of the same model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from pilotlight.artifact import TOKENIZER, Artifact
from pilotlight_export.errors import EvaluationError
from pilotlight_export.evaluate.figures import Quality
from pilotlight_export.recipes import PRECISIONS
from pilotlight_export.verify.fidelity import Comparison, compare_passage, joined
from pilotlight_export.verify.figures import rounded
from pilotlight_export.verify.graph_runner import Graphs
from pilotlight_export.verify.passages import Passage
from pilotlight_export.verify.text import SEGMENT_BYTES, SPARE_TOKENS, split_text


def measure_qualities(
    artifacts: Sequence[Artifact], text: str, on_artifact: Callable[[int, int], None]
) -> list[Quality]:
    """Let every artifact predict the same pieces of a text; ``on_artifact`` is told how many of how many are done.

    Raises:
        EvaluationError: a logit is not a number.
    """
    smallest_context = min(artifact.manifest.shapes.max_context_tokens for artifact in artifacts)
    pieces = split_text(text, min(SEGMENT_BYTES, smallest_context - SPARE_TOKENS))
    measured: dict[str, Quality] = {}
    for group in _by_model(artifacts):
        expected_graphs = _open_graphs(group[0])
        passages = _passages(group[0], pieces)
        for artifact in group:
            on_artifact(len(measured), len(artifacts))
            graphs = expected_graphs if artifact is group[0] else _open_graphs(artifact)
            compared = joined([compare_passage(expected_graphs, graphs, passage) for passage in passages])
            measured[artifact.digest] = _quality(artifact, compared, group[0], len(text.encode()))
    return [measured[artifact.digest] for artifact in artifacts]


def _by_model(artifacts: Sequence[Artifact]) -> list[list[Artifact]]:
    """Group artifacts of one model and tokenizer, the most precise one of each group first."""
    groups: dict[object, list[Artifact]] = defaultdict(list)
    for artifact in artifacts:
        source = artifact.manifest.source
        groups[source.model, source.revision, artifact.manifest.files[TOKENIZER].sha256].append(artifact)
    return [sorted(group, key=_imprecision) for group in groups.values()]


def _imprecision(artifact: Artifact) -> int:
    precision = artifact.manifest.precision
    return PRECISIONS.index(precision) if precision in PRECISIONS else len(PRECISIONS)


def _open_graphs(artifact: Artifact) -> Graphs:
    return Graphs(artifact.path, artifact.manifest.shapes)


def _passages(artifact: Artifact, pieces: Sequence[str]) -> list[Passage]:
    """Put the token that begins a text before each piece, so that every byte of it is predicted."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(artifact.tokenizer_path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special = artifact.manifest.special_tokens
    beginning = next((token for token in (special.bos_id, *special.eos_ids, special.pad_id) if token is not None), 0)
    encoded = [tokenizer.encode(piece, add_special_tokens=False).ids for piece in pieces]
    return [Passage([beginning], tokens) for tokens in encoded if tokens]


def _quality(artifact: Artifact, compared: Comparison, expected: Artifact, num_bytes: int) -> Quality:
    if not np.isfinite(compared.loss).all():
        raise EvaluationError(f"{artifact.path}: gives logits that are not numbers")
    return Quality(
        bits_per_byte=rounded(compared.loss.sum() / np.log(2) / num_bytes),
        perplexity=rounded(np.exp(compared.loss.mean())),
        top1_agreement=rounded(compared.agreement.mean()),
        mean_kl=rounded(compared.divergence.mean()),
        p99_kl=rounded(np.quantile(compared.divergence, 0.99)),
        compared_with=expected.path.resolve().name,
    )
