"""The two steps of verification, as an export takes them and ``pilotlight verify`` takes them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pilotlight_export.progress import Progress
from pilotlight_export.source import Source
from pilotlight_export.verify.consistency import check_consistency, measure_consistency
from pilotlight_export.verify.fidelity import check_fidelity, measure_fidelity
from pilotlight_export.verify.figures import Figures
from pilotlight_export.verify.graph_runner import Graphs
from pilotlight_export.verify.parity import check_parity, measure_parity
from pilotlight_export.verify.passages import Passage, sample_passages, text_passages
from pilotlight_export.verify.prompts import Prompts
from pilotlight_export.verify.reference import Reference
from pilotlight_export.verify.text import Text

BUILT_IN = "built-in"
"""What figures were measured on when the user chose no text: answers of the model to the built-in questions."""


@dataclass(frozen=True)
class Verified:
    """What an fp32 graph was found to be, and the passages on which artifacts made from it are compared with it."""

    figures: Figures
    passages: list[Passage]


def verify_exact(source: Source, exact: Path, prompts: Prompts, text: Text | None, progress: Progress) -> Verified:
    """Compare the fp32 graph with PyTorch. PyTorch's copy of the model is released before this returns.

    Raises:
        VerificationError: the graph does not compute what the model computes.
    """
    with progress.stage("Verify fp32 against PyTorch") as stage:
        graphs = Graphs(exact, source.shapes)
        sampled = sample_passages(graphs, prompts, source.special_tokens.eos_ids)
        parity = measure_parity(graphs, Reference(source.directory), sampled, prompts)
        check_parity(parity)
        stage.outcome = f"logits within {parity.largest_difference:.2g}"
        passages = text_passages(prompts, text.content, source.shapes.max_context_tokens) if text else sampled
        return Verified(asdict(parity) | {"text": text.digest if text else BUILT_IN}, passages)


def verify_consistency(source: Source, exact: Path, passages: Sequence[Passage], progress: Progress) -> Figures:
    """Compare an fp32 graph's ways of computing the same with one another.

    Raises:
        VerificationError: they differ.
    """
    with progress.stage("Verify steps and batches") as stage:
        consistency = measure_consistency(Graphs(exact, source.shapes), passages)
        check_consistency(consistency)
        stage.outcome = f"logits within {max(asdict(consistency).values()):.2g}"
    return asdict(consistency)


def verify_fidelity(
    source: Source, exact: Path, artifact: Path, passages: Sequence[Passage], max_kl: float | None, progress: Progress
) -> Figures:
    """Measure how closely an artifact's graphs follow the fp32 graph.

    Raises:
        VerificationError: they follow it less closely than ``max_kl``, or than any use could allow.
    """
    with progress.stage("Verify against fp32") as stage:
        graphs = Graphs(artifact, source.shapes)
        fidelity = measure_fidelity(Graphs(exact, source.shapes), graphs, passages)
        check_fidelity(fidelity, max_kl)
        stage.outcome = f"top-1 agreement {fidelity.top1_agreement:.3f}, mean KL {fidelity.mean_kl:.4f}"
        return asdict(fidelity) | asdict(measure_consistency(graphs, passages))
