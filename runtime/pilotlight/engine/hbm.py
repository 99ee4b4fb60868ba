"""How a device's memory is shared out: weights, workspace, KV cache. Pure; what is free is read by ``engine.nvml``."""

from __future__ import annotations

from dataclasses import dataclass

from pilotlight.artifact import KV_VALUE_BYTES, WEIGHTS, Artifact, Shapes
from pilotlight.engine.speculation import DRAFT_TOKENS
from pilotlight.errors import ConfigError

SHARE_OF_FREE = 0.92
"""The rest is for what nobody accounts for: handles of CUDA's libraries, fragments."""

LEAST_CONTEXT_TOKENS = 256
CONTEXT_QUANTUM_TOKENS = 64

INNER_PER_HIDDEN = 8
"""A bound for the inner size of a model's MLP over its hidden size, which the manifest does not name."""
HIDDEN_AT_A_TIME = 8
LOGIT_BYTES = 4 + 2 + 8
"""Float32 logits, the float16 ones that they are widened from, and an id beside each for picking the likeliest."""
ATTENTION_SPLITS = 32
"""Decode attention over a long cache works in so many parts at most, each with a float32 result of its own."""
FIXED_BYTES = 256 << 20
"""The workspaces of CUDA's libraries, whatever the model."""


@dataclass(frozen=True, slots=True)
class HbmPlan:
    """What a session may take of a device's memory, and how many slots of how much context that gives."""

    num_slots: int
    max_context_tokens: int
    weights_bytes: int
    workspace_bytes: int
    kv_bytes: int

    @property
    def arena_bytes(self) -> int:
        """The limit of the session's arena; the cache lies outside it."""
        return self.weights_bytes + self.workspace_bytes

    @property
    def total_bytes(self) -> int:
        """What the session takes at most."""
        return self.arena_bytes + self.kv_bytes


@dataclass(frozen=True, slots=True)
class Demand:
    """What a function asks of a device. ``is_context_fixed``: fewer slots, but never less context."""

    num_slots: int
    max_context_tokens: int
    max_chunk_tokens: int
    is_context_fixed: bool


def plan_hbm(free_bytes: int, artifact: Artifact, demand: Demand) -> HbmPlan:
    """Share out what is free: as many of the slots as fit, and of one slot as much context as fits, if it may shrink.

    Raises:
        ConfigError: not even one slot fits.
    """
    usable = int(free_bytes * SHARE_OF_FREE)
    weights, per_token = weights_bytes(artifact), kv_bytes_per_token(artifact)

    def fits(num_slots: int, context: int) -> HbmPlan | None:
        workspace = workspace_bytes(artifact, num_slots, demand.max_chunk_tokens)
        plan = HbmPlan(num_slots, context, weights, workspace, num_slots * context * per_token)
        return plan if plan.total_bytes <= usable else None

    low, high = 0, demand.num_slots
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle, demand.max_context_tokens) else (low, middle - 1)
    if plan := fits(low, demand.max_context_tokens) if low else None:
        return plan
    context = demand.max_context_tokens if demand.is_context_fixed else _context_of_one(usable, artifact, demand)
    if context >= LEAST_CONTEXT_TOKENS and (plan := fits(1, context)):
        return plan
    needed = HbmPlan(1, context, weights, workspace_bytes(artifact, 1, demand.max_chunk_tokens), context * per_token)
    raise ConfigError(
        f"{artifact.path}: needs {_mb(needed.total_bytes)} MB on the device for one slot of "
        f"{max(context, LEAST_CONTEXT_TOKENS):,} tokens; {_mb(usable)} MB of {_mb(free_bytes)} MB free may be used"
    )


def _context_of_one(usable: int, artifact: Artifact, demand: Demand) -> int:
    left = usable - weights_bytes(artifact) - workspace_bytes(artifact, 1, demand.max_chunk_tokens)
    tokens = max(0, left) // kv_bytes_per_token(artifact)
    return min(demand.max_context_tokens, tokens - tokens % CONTEXT_QUANTUM_TOKENS)


def weights_bytes(artifact: Artifact) -> int:
    """Return what the graph's weights take on the device: what they take in their file."""
    return artifact.manifest.files[WEIGHTS].size_bytes


def kv_bytes_per_token(artifact: Artifact) -> int:
    """Return what one token takes in the cache."""
    shapes = artifact.manifest.shapes
    return 2 * shapes.num_layers * shapes.num_kv_heads * shapes.head_size * KV_VALUE_BYTES[artifact.manifest.kv.dtype]


def workspace_bytes(artifact: Artifact, num_slots: int, max_chunk_tokens: int) -> int:
    """Return a bound for what a run takes beside weights and cache: a chunk of a prompt, or a step of all slots."""
    shapes = artifact.manifest.shapes
    per_token = KV_VALUE_BYTES["float16"] * shapes.hidden_size * (HIDDEN_AT_A_TIME + 3 * INNER_PER_HIDDEN)
    activations = max(max_chunk_tokens, num_slots) * per_token
    logits = (num_slots + max(DRAFT_TOKENS) + 1) * shapes.vocab_size * LOGIT_BYTES
    return FIXED_BYTES + activations + logits + _attention_bytes(shapes, num_slots) + _widened_bytes(artifact)


def _attention_bytes(shapes: Shapes, num_slots: int) -> int:
    return num_slots * shapes.num_heads * ATTENTION_SPLITS * (shapes.head_size + 2) * KV_VALUE_BYTES["float32"]


def _widened_bytes(artifact: Artifact) -> int:
    """Return what the largest weight takes as float16, which a quantized one becomes for a prompt's many rows."""
    shapes = artifact.manifest.shapes
    if artifact.manifest.precision == "fp16":
        return 0
    return max(shapes.vocab_size, INNER_PER_HIDDEN * shapes.hidden_size) * shapes.hidden_size * 2


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f}"
