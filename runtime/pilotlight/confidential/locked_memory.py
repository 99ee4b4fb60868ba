"""Memory for what must not reach a disk: left out of core dumps, and locked where it could be swapped out.

Locking needs a limit (``ulimit -l``) or a capability. Where neither is given and the machine has swap, nothing is
decrypted. ``memfd_secret`` would hide the pages from the kernel, too, but it maps them one by one: on our machine it
took 0.2 GB a second against 2.8, and ONNX Runtime copies the weights into memory of its own anyway.

Source: mlock(2), madvise(2), prctl(2), setrlimit(2).
"""

from __future__ import annotations

import ctypes
import mmap
import resource
from contextlib import suppress
from pathlib import Path

from pilotlight.errors import ConfigError

PR_SET_DUMPABLE = 4
MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4
SWAPS = Path("/proc/swaps")


def allocate(num_bytes: int) -> memoryview:
    """Return zeroed memory that goes back to the system with the last reference to it.

    Raises:
        ConfigError: it cannot be locked, and the machine has swap.
    """
    memory = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTDUMP)
    if not _lock(memory) and has_swap():
        raise ConfigError(
            f"{num_bytes:,} bytes of a sealed artifact cannot be locked into memory, and this machine has swap: "
            "raise the limit (ulimit -l), or turn swap off"
        )
    return memoryview(memory)[:num_bytes]


def harden_process() -> None:
    """Let nobody read this process's memory from outside it or find it in a core dump or in swap, as far as it goes.

    Locking everything is tried where there is swap only; ``allocate`` insists, this does not.
    """
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = _libc()
    if libc is None:
        return
    with suppress(AttributeError):
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        if has_swap() and resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY:
            libc.mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT)


def has_swap(swaps: Path = SWAPS) -> bool:
    """Return whether memory may be written to a disk; yes where the system does not tell."""
    try:
        return len(swaps.read_text().splitlines()) > 1
    except OSError:
        return True


def _lock(memory: mmap.mmap) -> bool:
    libc = _libc()
    if libc is None:
        return False
    start = (ctypes.c_char * len(memory)).from_buffer(memory)
    try:
        return bool(libc.mlock(ctypes.byref(start), ctypes.c_size_t(len(memory))) == 0)
    except AttributeError:
        return False
    finally:
        del start


def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None, use_errno=True)
    except OSError:
        return None
