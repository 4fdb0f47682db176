"""Resident memory of a process, from Linux's /proc; None where there is none."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path


def resident(pid: int | str = "self", *, peak: bool = False) -> int | None:
    """Bytes resident now, or at the most since the start (or since `reset_peak`)."""
    field = "VmHWM:" if peak else "VmRSS:"
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def available() -> int | None:
    """Bytes that can still be used without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def reset_peak() -> None:
    """Give back what is free and let the peak start again; without permission it stays that of the whole process."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # a C library without malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
