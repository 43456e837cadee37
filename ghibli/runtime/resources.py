"""Compute resources: the device, free memory and disk, memory of this process."""

import shutil
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from ghibli.runtime.home import expanded

CGROUP = Path("/sys/fs/cgroup")  # memory limits of the container this process runs in


def device_name(device: torch.device) -> str:
    """Return what rounding depends on: the GPU model and matmul precision, or the number of CPU threads."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {torch.get_float32_matmul_precision()}"
    return f"{device.type}, {torch.get_num_threads()} threads"


def reset_peak_memory() -> None:
    """Restart the count of `peak_memory`, so that a trial does not inherit the peak of the previous one.

    The kernel resets the peak resident memory of a process through /proc; psutil has no call for it.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # Linux only
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """Return the peak memory in bytes since `reset_peak_memory`: of the GPU if there is one, else resident.

    None where there is no /proc.
    """
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident_memory()


def peak_resident_memory() -> int | None:
    """Return the largest resident memory of this process so far in bytes; None where there is no /proc.

    psutil does not report VmHWM, the only peak that can be reset.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def resident_memory() -> int:
    """Return the resident memory of this process in bytes."""
    return psutil.Process().memory_info().rss


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process can still allocate on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    limit = free_in_container()
    return available if limit is None else min(available, limit)


def free_in_container() -> int | None:
    """Return the bytes left below the container's memory limit (cgroup v2); None without a limit.

    psutil reports the memory of the machine, which may be far more than a container is allowed.
    """
    try:
        limit = int((CGROUP / "memory.max").read_text())  # `max` where there is none
        return limit - int((CGROUP / "memory.current").read_text()) + reclaimable()
    except (OSError, ValueError):
        return None


def reclaimable() -> int:
    """Return the bytes of inactive page cache: counted as used, but freed as soon as memory is needed."""
    try:
        lines = (CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def free_disk(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist yet."""
    existing = expanded(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free
