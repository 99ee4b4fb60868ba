"""What a function may use of its model and its machine: context, threads, bytes."""

from __future__ import annotations

import os

from pilotlight.artifact import BATCH_GRAPH, GRAPH, KV_VALUE_BYTES, PREFILL_GRAPH, Artifact
from pilotlight.config import FunctionSettings
from pilotlight.errors import ConfigError

DEFAULT_MAX_CONTEXT_TOKENS = 4096
"""A slot's cache grows with its context, and models that were trained on 128 k tokens would fill a machine's memory."""


def num_cores() -> int:
    """Return the cores that this process may run on, where the system tells, else all of them."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def max_context_tokens(name: str, settings: FunctionSettings, artifact: Artifact) -> int:
    """Return how long prompt and answer may be together.

    Raises:
        ConfigError: the settings want more than the model or its cache can.
    """
    longest = artifact.manifest.shapes.max_context_tokens
    budget = settings.kv_budget_tokens
    if settings.max_context_tokens is None:
        return min(longest, DEFAULT_MAX_CONTEXT_TOKENS, budget or longest)
    if settings.max_context_tokens > longest:
        raise ConfigError(
            f"functions.{name}.max_context_tokens is {settings.max_context_tokens}; the model's context is {longest}"
        )
    if budget is not None and budget < settings.max_context_tokens:
        raise ConfigError(
            f"functions.{name}.kv_budget_tokens is {budget}; one request alone may need the "
            f"{settings.max_context_tokens} of max_context_tokens"
        )
    return settings.max_context_tokens


def kv_bytes(artifact: Artifact, num_slots: int, max_context_tokens: int) -> int:
    """Return the size of the KV cache, every slot full, and of the prompt's own cache where there is one."""
    manifest = artifact.manifest
    values_per_token = 2 * manifest.shapes.num_layers * manifest.shapes.num_kv_heads * manifest.shapes.head_size
    of_slots = num_slots * KV_VALUE_BYTES[manifest.kv.dtype]
    of_prompt = KV_VALUE_BYTES["float32"] if manifest.stages_prompts else 0
    return values_per_token * (of_slots + of_prompt) * max_context_tokens


def weights_bytes(artifact: Artifact) -> int:
    """Return the size of the graphs and their weights, as if all of it became private memory."""
    stems = (GRAPH, PREFILL_GRAPH, BATCH_GRAPH)
    return sum(file.size_bytes for name, file in artifact.manifest.files.items() if name.startswith(stems))
