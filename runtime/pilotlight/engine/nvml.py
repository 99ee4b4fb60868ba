"""How much memory an NVIDIA GPU has and how much of it is used, as its driver says (NVML)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class HbmReading:
    """A GPU's memory at one instant, whoever uses it."""

    used_bytes: int
    free_bytes: int
    total_bytes: int


class Gpu:
    """One GPU, counted as CUDA counts: among those that this process may see."""

    def __init__(self, index: int = 0, environment: Mapping[str, str] = os.environ) -> None:
        """Find it.

        Raises:
            LookupError: there is no such GPU, no driver, or not the package that asks it.
        """
        try:
            import pynvml
        except ImportError as error:
            raise LookupError("nvidia-ml-py is not installed") from error
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            self._handle = self._find(index, environment.get("CUDA_VISIBLE_DEVICES", ""))
            name = pynvml.nvmlDeviceGetName(self._handle)
        except pynvml.NVMLError as error:
            raise LookupError(f"there is no GPU {index} ({error})") from error
        self.name: str = name.decode() if isinstance(name, bytes) else name

    def read(self) -> HbmReading:
        """Return its memory now."""
        memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        return HbmReading(int(memory.used), int(memory.free), int(memory.total))

    def _find(self, index: int, visible: str) -> Any:
        names = [name.strip() for name in visible.split(",") if name.strip()]
        if not names:
            return self._nvml.nvmlDeviceGetHandleByIndex(index)
        if index >= len(names):
            raise LookupError(f"there is no GPU {index}: CUDA_VISIBLE_DEVICES names {len(names)}")
        name = names[index]
        if name.isdecimal():
            return self._nvml.nvmlDeviceGetHandleByIndex(int(name))
        return self._nvml.nvmlDeviceGetHandleByUUID(name)
