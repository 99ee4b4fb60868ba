"""The decoder families that can be exported: one row each.

A row holds what differs between families and cannot be read out of the exported graph. Everything else (weights, norms,
activations, rotary frequencies, which layers have biases) the fusion finds in the graph itself.
"""

from __future__ import annotations

from dataclasses import dataclass

STATIC_ROPE = frozenset({"default", "linear", "llama3"})


@dataclass(frozen=True)
class Family:
    """A decoder family: its name in manifests and the modules that the fusion looks for in every layer."""

    name: str
    query: str = "self_attn/q_proj"
    key: str = "self_attn/k_proj"
    value: str = "self_attn/v_proj"
    attention_out: str = "self_attn/o_proj"
    gate: str = "mlp/gate_proj"
    up: str = "mlp/up_proj"
    rotary: str = "/model/rotary_emb"
    rope_types: frozenset[str] = STATIC_ROPE


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama"),
}
