"""The report in an artifact: what a person wants to know before serving it. The same export writes the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pilotlight.artifact import Manifest

REPORT = "report.md"

MEANINGS = {
    "prefill_max_abs_difference": "short prompts: largest logit difference from PyTorch",
    "chunked_prefill_max_abs_difference": "a long prompt in two chunks: the same",
    "batched_decode_max_abs_difference": "step by step in a batch: the same",
    "full_context_max_abs_difference": "full context in one pass: the same",
    "full_context_tokens": "tokens of that full context",
    "steps_max_abs_difference": "step by step against one pass: largest logit difference",
    "batch_max_abs_difference": "in a batch against alone: largest logit difference",
    "top1_agreement": "share of positions whose likeliest token is that of fp32",
    "mean_kl": "mean KL divergence from fp32, nats",
    "p99_kl": "99th percentile of the KL divergence, nats",
    "perplexity_ratio": "perplexity, as a multiple of that of fp32",
    "decode_mean_kl": "mean KL divergence step by step in a batch, nats",
    "num_positions": "positions that were compared",
    "text": "text that was compared",
}
PARITY = tuple(MEANINGS)[:5]


def report(manifest: Manifest) -> str:
    """Describe an artifact in Markdown."""
    sections = [_title(manifest), _origin(manifest), _recipe(manifest), _verification(manifest), _again(manifest)]
    return "\n\n".join(section for section in [*sections, _contents(manifest)] if section) + "\n"


def _title(manifest: Manifest) -> str:
    return (
        f"# {manifest.source.model}, {manifest.precision}\n\n"
        f"An artifact of Pilotlight {manifest.tools.get('pilotlight', '')}: "
        "a model that was exported, checked against its source, and sealed."
    )


def _origin(manifest: Manifest) -> str:
    shapes = manifest.shapes
    rows = [
        ("Model", manifest.source.model),
        ("Revision", manifest.source.revision or "none: a local directory"),
        ("Licence", manifest.source.license or "not stated"),
        ("Family", manifest.family),
        ("Parameters", f"{manifest.num_parameters:,}"),
        ("Layers", f"{shapes.num_layers}, hidden size {shapes.hidden_size:,}"),
        ("Attention", f"{shapes.num_heads} heads of {shapes.head_size}, {shapes.num_kv_heads} for keys and values"),
        ("Vocabulary", f"{shapes.vocab_size:,}"),
        ("Context", f"{shapes.max_context_tokens:,} tokens"),
    ]
    return f"## What was exported\n\n{_table(('', ''), rows)}"


def _recipe(manifest: Manifest) -> str:
    rows = [(f"`{key}`", value) for key, value in manifest.recipe.items()]
    return f"## How the weights are stored\n\nAs {manifest.precision}.\n\n{_table(('Rule', 'Setting'), rows)}"


def _verification(manifest: Manifest) -> str:
    parity = [(name, value) for name, value in manifest.verification.items() if name in PARITY]
    others = [(name, value) for name, value in manifest.verification.items() if name not in PARITY]
    return (
        "## What was verified\n\n"
        "The fp32 graph, from which this artifact was made, against PyTorch:\n\n"
        f"{_figures(parity)}\n\n"
        "This artifact:\n\n"
        f"{_figures(others)}"
    )


def _again(manifest: Manifest) -> str:
    revision = f" --revision {manifest.source.revision}" if manifest.source.revision else ""
    recipe = f" --recipe {manifest.recipe['name']}" if "name" in manifest.recipe else ""
    text = " --text FILE" if str(manifest.verification.get("text", "")).startswith("sha256:") else ""
    model = manifest.source.model
    return (
        "## How to do it again\n\n"
        "```\n"
        f"pilotlight export {model}{revision} --precision {manifest.precision}{recipe}{text} --out ARTIFACT\n"
        f"pilotlight verify ARTIFACT --source {model}{text}\n"
        "```\n\n"
        "The same source, revision, recipe and versions give the same bytes on the same kind of processor. "
        f"The versions were {', '.join(f'{name} {version}' for name, version in manifest.tools.items())}."
    )


def _contents(manifest: Manifest) -> str:
    rows = [(f"`{name}`", f"{entry.size_bytes:,}", f"`{entry.sha256}`") for name, entry in manifest.files.items()]
    return f"## Files\n\n{_table(('File', 'Bytes', 'SHA-256'), rows)}"


def _figures(figures: Sequence[tuple[str, object]]) -> str:
    return _table(("Figure", "Value", ""), [(f"`{n}`", value, MEANINGS.get(n, "")) for n, value in figures])


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
