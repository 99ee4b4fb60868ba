"""The KV cache: slots move without disturbing others, and memory is resident only where a slot was written."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from pilotlight.artifact import Shapes
from pilotlight.engine.slots import KvCache

SHAPES = Shapes(
    num_layers=4,
    num_heads=8,
    num_kv_heads=8,
    head_size=64,
    hidden_size=512,
    vocab_size=512,
    max_context_tokens=2048,
)


def test_a_move_copies_one_slot_and_leaves_the_others() -> None:
    cache = KvCache(SHAPES, "float32", num_slots=3, max_context_tokens=16)
    for number, buffer in enumerate((*cache.keys, *cache.values)):
        buffer[:] = np.arange(3)[:, None, None, None] + number * 10
    cache.move(source=2, target=0, num_tokens=5)
    for number, buffer in enumerate((*cache.keys, *cache.values)):
        assert (buffer[0, :, :5] == 2 + number * 10).all()
        assert (buffer[0, :, 5:] == number * 10).all()
        assert (buffer[1] == 1 + number * 10).all()


def test_sizes() -> None:
    cache = KvCache(SHAPES, "float16", num_slots=3, max_context_tokens=16)
    assert cache.bytes_per_token == 2 * 4 * 8 * 64 * 2
    assert cache.reserved_bytes == 3 * 16 * cache.bytes_per_token


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of resident memory")
def test_a_few_tokens_in_every_slot_make_little_memory_resident() -> None:
    before = _resident_bytes()
    cache = KvCache(SHAPES, "float32", num_slots=4, max_context_tokens=2048)
    for buffer in (*cache.keys, *cache.values):
        buffer[:, :, :32] = 1
    written = 4 * 32 * cache.bytes_per_token
    assert written < cache.reserved_bytes / 32
    assert _resident_bytes() - before < 2 * written


def _resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
