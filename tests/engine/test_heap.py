"""The heap's thresholds: what is allocated while a graph is opened goes back to the system when it is freed."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import onnxruntime as ort
import pytest

from pilotlight.artifact import Artifact
from pilotlight.engine import session
from pilotlight.engine.heap import large_blocks_apart
from pilotlight.engine.session import OnnxSession

WHERE_BLOCKS_LIE = """
import ctypes
from pilotlight.engine.heap import large_blocks_apart

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
mallinfo2 = libc.mallinfo2
mallinfo2.restype = type("Info", (ctypes.Structure,), {"_fields_": [(str(i), ctypes.c_size_t) for i in range(10)]})


def num_mapped():
    return getattr(mallinfo2(), "3")


def mapped_by(num_mib):
    before = num_mapped()
    block = libc.malloc(num_mib * 1024**2)
    added = num_mapped() - before
    libc.free(block)
    assert num_mapped() == before
    return added


found = [mapped_by(4), mapped_by(4)]
with large_blocks_apart():
    found += [mapped_by(8), mapped_by(8)]
found += [mapped_by(8), mapped_by(8)]
print(found)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library is not glibc 2.33 or later")
def test_large_blocks_are_mapped_while_a_graph_is_opened_and_not_afterwards() -> None:
    found = subprocess.run([sys.executable, "-c", WHERE_BLOCKS_LIE], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[1, 0, 1, 1, 0, 0]"


@pytest.mark.model
def test_every_graph_is_opened_so(demo_hybrid: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    depth, opened_at = 0, []
    opens = ort.InferenceSession

    @contextmanager
    def counted() -> Iterator[None]:
        nonlocal depth
        depth += 1
        with large_blocks_apart():
            yield
        depth -= 1

    def noted(*arguments: object, **options: object) -> ort.InferenceSession:
        opened_at.append(depth)
        return opens(*arguments, **options)

    monkeypatch.setattr(session, "large_blocks_apart", counted)
    monkeypatch.setattr(ort, "InferenceSession", noted)
    OnnxSession(demo_hybrid, 1, 64, 1)
    assert opened_at == [1, 1, 1]
