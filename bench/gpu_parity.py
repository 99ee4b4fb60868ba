"""Whether an artifact computes on a device what it should: beside PyTorch, and beside itself on the processor."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pilotlight.artifact import Artifact
from pilotlight.engine.device import Device, DeviceSession
from pilotlight.engine.device_logits import DeviceLogits
from pilotlight.engine.session import OnnxSession

Logits = NDArray[np.float32]

MAX_MEAN_KL = {"fp16": 0.01, "int4-fp16": 0.01}
"""Nats beside the same artifact on the processor: what is left there is the order of float16's sums."""
MAX_MEAN_KL_TO_PYTORCH = {"fp16": 0.02}
"""What four bits cost is the export's business, which measured it."""


class _Session(Protocol):
    def prefill(self, slot: int, token_ids: Any, past_tokens: int) -> Any: ...
    def decode(self, token_ids: Any, past_tokens: Any) -> Any: ...


@dataclass(frozen=True)
class Parity:
    """How far predictions are apart: the mean divergence in nats, and how often the likeliest token is the same."""

    against: str
    num_positions: int
    mean_kl: float
    top1_agreement: float
    largest_difference: float
    limit: float | None

    @property
    def holds(self) -> bool:
        return self.limit is None or self.mean_kl <= self.limit


def texts_for(artifact: Artifact, num_texts: int, num_tokens: int) -> list[list[int]]:
    """Return texts of random tokens, each longer than the one before, which fit the context."""
    vocab_size = artifact.manifest.shapes.vocab_size
    longest = min(num_tokens, artifact.manifest.shapes.max_context_tokens)
    lengths = [max(4, longest * (index + 1) // num_texts) for index in range(num_texts)]
    return [random.Random(length).choices(range(3, vocab_size), k=length) for length in lengths]


def predictions(session: _Session, texts: list[list[int]], num_steps: int) -> Logits:
    """Return the logits [texts × (1 + steps), V] behind each text's prompt and behind each of its last ``num_steps``
    tokens, which are decoded in one batch."""
    found, pasts = [], []
    for slot, text in enumerate(texts):
        prompt = text[:-num_steps]
        half = len(prompt) // 2
        if half:
            session.prefill(slot, np.array(prompt[:half], np.int64), 0)
        found.append(_host(session.prefill(slot, np.array(prompt[half:], np.int64), half)))
        pasts.append(len(prompt))
    for step in range(num_steps):
        token_ids = np.array([text[len(text) - num_steps + step] for text in texts], np.int64)
        found.append(_host(session.decode(token_ids, np.array(pasts, np.int64) + step)))
    return np.concatenate(found)


def pytorch_predictions(model_dir: Path, texts: list[list[int]], num_steps: int, kind: str) -> Logits:
    """Return the same of the source model in PyTorch, on the GPU where that is measured, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(str(model_dir), dtype=torch.float32, local_files_only=True).to(kind).eval()
    rows = []
    with torch.inference_mode():
        for text in texts:
            logits = model(torch.tensor([text], device=kind), logits_to_keep=num_steps + 1).logits[0]
            rows.append(logits.float().cpu().numpy())
    # the order of ``predictions``: all prompts, then step by step
    return np.concatenate([np.stack([row[step] for row in rows]) for step in range(num_steps + 1)])


def compare(against: str, expected: Logits, found: Logits, limit: float | None) -> Parity:
    """Return how far apart two predictions of the same positions are."""
    likely, said = _log_softmax(expected), _log_softmax(found)
    divergence = (np.exp(likely) * (likely - said)).sum(axis=-1)
    return Parity(
        against,
        len(expected),
        float(divergence.mean()),
        float((expected.argmax(-1) == found.argmax(-1)).mean()),
        float(np.abs(expected - found).max()),
        limit,
    )


def check(
    artifact: Artifact, model_dir: Path, device: Device, precision: str, num_texts: int = 4, num_steps: int = 8
) -> list[Parity]:
    """Compare an artifact on a device with itself on the processor and with its source in PyTorch."""
    texts = texts_for(artifact, num_texts, 256)
    context = max(map(len, texts)) + 1
    there = predictions(DeviceSession(artifact, num_texts, context, device), texts, num_steps)
    here = predictions(OnnxSession(artifact, num_texts, context, device.num_threads or 4), texts, num_steps)
    source = pytorch_predictions(model_dir, texts, num_steps, device.kind)
    return [
        compare("the same artifact on the processor", here, there, MAX_MEAN_KL.get(precision)),
        compare("PyTorch, float32", source, there, MAX_MEAN_KL_TO_PYTORCH.get(precision)),
    ]


def _host(logits: Logits | DeviceLogits) -> Logits:
    if isinstance(logits, DeviceLogits):
        return logits.host(list(range(len(logits))))
    return logits.copy()


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
