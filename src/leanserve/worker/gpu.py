"""Memory of this process on the GPUs of the machine, from NVIDIA's driver."""

from __future__ import annotations

import logging
import os
import threading
from types import ModuleType
from typing import Any, Final

from leanserve.errors import SettingsError

__all__ = ["GpuMemory", "used_bytes"]

logger = logging.getLogger("leanserve")

_PERIOD_S: Final = 5.0


class GpuMemory:
    """Asks every few seconds, in a thread: the driver may take its time, and the event loop has none.

    Raises:
        SettingsError: pynvml is not there, or has no driver to talk to.
    """

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError:
            raise SettingsError(
                "limit_max_gpu_memory needs pynvml, to ask the driver: pip install nvidia-ml-py"
            ) from None
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise SettingsError(f"limit_max_gpu_memory: the NVIDIA driver cannot be asked: {error}") from None
        self._nvml: Any = pynvml
        self._used = 0
        self._ask_s = 0.0
        self._asks = False

    def look(self, now_s: float) -> int:
        """Bytes that were in use when the driver last said so; `now_s` is monotonic."""
        if now_s >= self._ask_s and not self._asks:
            self._ask_s = now_s + _PERIOD_S
            self._asks = True
            threading.Thread(target=self._ask, name="leanserve-gpu", daemon=True).start()
        return self._used

    def _ask(self) -> None:
        try:
            self._used = used_bytes(self._nvml, os.getpid())
        except self._nvml.NVMLError as error:
            logger.warning("the NVIDIA driver does not say how much memory is used: %s", error)
        finally:
            self._asks = False


def used_bytes(nvml: ModuleType | Any, pid: int) -> int:
    """What a process has on all GPUs together, by the functions of pynvml."""
    devices = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    return sum(
        process.usedGpuMemory or 0  # None: the driver does not say (on Windows, in parts of a GPU)
        for device in devices
        for process in nvml.nvmlDeviceGetComputeRunningProcesses(device)
        if process.pid == pid
    )
