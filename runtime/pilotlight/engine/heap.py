"""The C library's heap: what is freed there should go back to the system, where that library can be told."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# glibc's mallopt(3)
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
APART_BYTES = 128 * 1024
WITHIN_BYTES = 32 * 1024**2  # as far as glibc itself raises the first threshold; it raises the second to twice that


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Have large blocks that are allocated meanwhile mapped one by one, so that each is gone when it is freed.

    glibc does so only until the first of them is freed; then blocks of up to that size come from its heap, to map less.
    Between steps that is left as it is.
    """
    _set_thresholds(APART_BYTES, APART_BYTES)
    try:
        yield
    finally:
        _set_thresholds(WITHIN_BYTES, 2 * WITHIN_BYTES)


def return_freed_memory() -> None:
    """Give back to the system what was freed among smaller blocks."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _set_thresholds(mapped_from_bytes: int, trimmed_from_bytes: int) -> None:
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, mapped_from_bytes)
        libc.mallopt(M_TRIM_THRESHOLD, trimmed_from_bytes)
