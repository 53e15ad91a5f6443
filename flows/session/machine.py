"""What this machine offers to one command: cores, memory, disk and GPUs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0))


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Return the bytes that are free or that the system would give up of its page cache.

    Free pages alone are few wherever files have been read, and a checkpoint has just been.
    """
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, LookupError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_disk(folder: Path) -> int:
    """Return the free bytes on the disk of a folder that may not exist yet."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free


def cuda_device_count() -> int:
    """Return how many CUDA devices torch sees."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
