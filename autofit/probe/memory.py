"""Who holds how many bytes of the card, by NVML and by torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress

import psutil
import pynvml
import torch

from autofit import host
from autofit.units import format_bytes

# Where neither NVML nor a fresh context can tell: an H200 with CUDA 13.0 holds 0.514 GiB before the
# first tensor (measured), smaller cards less.
CONTEXT_BYTES = 560_000_000


def total_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return host.machine_bytes()


def used_bytes(device: torch.device) -> int | None:
    """What all processes together hold on the card, asked of NVML without creating a context."""
    try:
        pynvml.nvmlInit()
        handle = _nvml_handle(device)
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    except pynvml.NVMLError:
        return None


def own_bytes(device: torch.device) -> int | None:
    """What this process holds on the card, where NVML sees it under the number it has here."""
    try:
        pynvml.nvmlInit()
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(_nvml_handle(device))
    except pynvml.NVMLError:
        return None
    return next((p.usedGpuMemory for p in running if p.pid == os.getpid()), None)


def free_bytes(device: torch.device) -> int:
    """What nobody holds of the card."""
    return int(torch.cuda.mem_get_info(device)[0])


def holders(device: torch.device) -> list[tuple[str, int]]:
    """The other processes on the card, those that hold most first: name and number, and bytes."""
    try:
        pynvml.nvmlInit()
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(_nvml_handle(device))
    except pynvml.NVMLError:
        return []
    others = [(p.pid, p.usedGpuMemory or 0) for p in running if p.pid != os.getpid()]
    return [(_named(pid), held) for pid, held in sorted(others, key=lambda o: -o[1])]


def holders_text(device: torch.device) -> str:
    """The other processes on the card and what each holds, for a reader."""
    found = [f"{name} {format_bytes(held)}" for name, held in holders(device)]
    return ", ".join(found) or "the driver does not say who"


def _named(pid: int) -> str:
    with suppress(psutil.Error):
        return f"{psutil.Process(pid).name()} ({pid})"
    return f"process {pid}"


def driver_version() -> str:
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return "unknown"


def card_name(device: torch.device) -> str | None:
    """What NVML calls the card: torch would make a context to tell. None where it does not say."""
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        return str(pynvml.nvmlDeviceGetName(_nvml_handle(device)))
    return None


def _nvml_handle(device: torch.device) -> object:
    """NVML numbers the cards of the machine, torch those that CUDA_VISIBLE_DEVICES shows."""
    index = device.index or 0
    with suppress(AttributeError, RuntimeError, pynvml.NVMLError):
        if torch.cuda.is_initialized():
            uuid = torch.cuda.get_device_properties(device).uuid
            return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        index = torch.cuda._get_nvml_device_index(device)
    return pynvml.nvmlDeviceGetHandleByIndex(index)


def before_context(device: torch.device) -> int | None:
    """The card's used bytes while this process has no context yet; None once it has."""
    if device.type != "cuda" or torch.cuda.is_initialized():
        return None
    return used_bytes(device)


def context_bytes(device: torch.device, before_bytes: int | None) -> int:
    """What a process holds on the card before torch's first tensor.

    Measured as the growth of the card's used bytes since ``before_context``; where that was not to
    be had, the constant above stands in.
    """
    torch.zeros(1, device=device)
    torch.cuda.synchronize(device)
    after_bytes = used_bytes(device)
    if before_bytes is None or after_bytes is None:
        return CONTEXT_BYTES
    return max(0, after_bytes - before_bytes - torch.cuda.memory_reserved(device))


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of the work on the device's own clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)  # of this card: not the current one, perhaps
    begin.record(stream)
    work()
    end.record(stream)
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1e3
