"""The decoder families that can be exported: one row each.

A row holds what differs between families and cannot be read out of the exported graph. Everything else (weights, norms,
activations, rotary frequencies, windows, soft caps, scales, which layers have biases) the fusion finds in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary scalings whose angles depend on the position alone, never on how long the text has become."""

LONG_ROPE = frozenset({"longrope", "su"})
"""Scalings with other factors beyond the original context, so such a model is exported up to its original context."""


@dataclass(frozen=True)
class Family:
    """A decoder family.

    ``name`` goes into manifests. ``assumed`` is added to a config.json that does not say otherwise, for our own reading
    of it and for transformers'. ``adopted_code`` names classes that models of the family bring as code of their own and
    that transformers has adopted since; its own classes stand in for them.
    """

    name: str
    rope_types: frozenset[str] = STATIC_ROPE
    assumed: Mapping[str, Any] = field(default_factory=dict)
    adopted_code: frozenset[str] = frozenset()


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama"),
    "MistralForCausalLM": Family("mistral"),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3", assumed={"head_dim": 128}),
    "Phi3ForCausalLM": Family(
        "phi3",
        rope_types=frozenset({"default"}) | LONG_ROPE,
        assumed={"original_max_position_embeddings": 4096},
        adopted_code=frozenset({"configuration_phi3.Phi3Config", "modeling_phi3.Phi3ForCausalLM"}),
    ),
    "GemmaForCausalLM": Family("gemma", assumed={"head_dim": 256}),
    # Transformers' default attention, SDPA, leaves Gemma 2's soft cap out without a word.
    "Gemma2ForCausalLM": Family("gemma2", assumed={"head_dim": 256, "_attn_implementation": "eager"}),
    "Gemma3ForCausalLM": Family("gemma3", assumed={"head_dim": 256}),
    "SmolLM3ForCausalLM": Family("smollm3"),
    "GraniteForCausalLM": Family("granite"),
    "Olmo2ForCausalLM": Family("olmo2"),
}
