"""The machine: device, memory and disk that are free, memory that this process takes."""

import shutil
from contextlib import suppress
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """What rounding depends on: the GPU's model, or the number of CPU threads."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {torch.get_float32_matmul_precision()}"
    return f"{device.type}, {torch.get_num_threads()} threads"


MEMORY_LIMITS = Path("/sys/fs/cgroup")  # of the container this process is in


def forget_peak() -> None:
    """Starts peak_memory anew, so that a trial's peak is not that of the one before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # Linux only
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """Most bytes taken since forget_peak: on the GPU if there is one, else by this process; None unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return of_this_process("VmHWM")


def of_this_process(name: str) -> int | None:
    """Bytes that Linux counts under a name such as VmRSS, what this process holds now; None elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still take on the device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    try:
        limit = int((MEMORY_LIMITS / "memory.max").read_text())  # `max` where there is none
        used = int((MEMORY_LIMITS / "memory.current").read_text()) - reclaimable()
    except (OSError, ValueError):
        return free
    return min(free, limit - used)


def reclaimable() -> int:
    """Bytes of files read a while ago, which count as used and go as soon as somebody needs the room."""
    try:
        lines = (MEMORY_LIMITS / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def free_disk(folder: Path) -> int:
    """Free bytes where the folder is or will be."""
    place = folder.expanduser().absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
