"""A torch device -> Device: what it holds, its rates, and which attention kernels answer."""

from __future__ import annotations

import hashlib
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields, replace
from importlib import metadata
from pathlib import Path

import platformdirs
import torch
from pydantic import TypeAdapter, ValidationError
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from autofit import host
from autofit.files import write_whole
from autofit.probe import memory
from autofit.probe.launch import launch_s
from autofit.spec import HEAD_SIZES, BadInput, Device, Kernel
from autofit.units import MIB

PACKAGES = (
    "torch", "diffusers", "transformers", "accelerate", "xformers", "sageattention", "autofit",
)  # fmt: skip
SDPA_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
COPY_BYTES = 256 * MIB  # large enough to pass caches, small enough for a card of 2 GiB
MATRIX_SIDE = {"cuda": 4096, "cpu": 256}
_DEVICE = TypeAdapter(Device)


def probe_device(device: str, *, fresh: bool = False) -> Device:
    """Measure a device ("cuda:0", "cpu") in a few seconds, or read what was measured before.

    Cached by machine and versions in the user's cache folder (``$AUTOFIT_HOME`` if set), but for
    the host's limit: a cgroup's differs from process to process.

    Raises:
        BadInput: there is no such device.
    """
    target = device_named(device)
    before = memory.before_context(target)  # first: asking torch for versions makes the context
    cache = _cache_path(target)
    if not fresh and cache.exists():
        # Written by another version of autofit, damaged, not to be read: measured anew below.
        with suppress(ValidationError, OSError):
            known = _DEVICE.validate_json(cache.read_bytes())
            return replace(known, host_limit_bytes=host.machine_bytes())
    found = _measure(target, before)
    # A folder that cannot be written costs a few seconds the next time.
    with suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_whole(cache, _DEVICE.dump_json(found, indent=1))
    return found


def device_named(device: str) -> torch.device:
    """Return the torch device that a text names.

    Raises:
        BadInput: there is no such device.
    """
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise BadInput(f"device {device!r}: not a device; write cuda:0 or cpu") from error
    if target.type not in ("cuda", "cpu"):
        raise BadInput(f"device {device!r}: autofit plans for cuda and cpu")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise BadInput(
            f"device {device!r}: torch sees {count} CUDA devices here; --device cpu works"
        )
    return target


def _measure(device: torch.device, before_bytes: int | None) -> Device:
    cuda = device.type == "cuda"
    context_bytes = memory.context_bytes(device, before_bytes) if cuda else 0
    pinned_s, pageable_s, copied_s = (_copy_rates if cuda else _host_rates)(device)
    found = Device(
        kind="cuda" if cuda else "cpu",
        name=torch.cuda.get_device_name(device) if cuda else _processor(),
        total_bytes=memory.total_bytes(device),
        capability=torch.cuda.get_device_capability(device) if cuda else None,
        context_bytes=context_bytes,
        host_limit_bytes=host.machine_bytes(),
        pinned_bytes_s=pinned_s,
        pageable_bytes_s=pageable_s,
        memory_bytes_s=copied_s,
        flops_s={str(d).removeprefix("torch."): _matrix_rate(device, d) for d in DTYPES},
        kernels=tuple(_answering(device)),
        versions=versions(device),
        launch_s=launch_s(device),
    )
    if cuda:
        torch.cuda.empty_cache()
    return found


def versions(device: torch.device) -> dict[str, str]:
    """The versions that a measurement depends on; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        found["torch"] = str(torch.__version__)  # a class of its own, which YAML does not know
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
        found["driver"] = memory.driver_version()
    return found


def _cache_path(device: torch.device) -> Path:
    home = os.environ.get("AUTOFIT_HOME")
    folder = Path(home) / "cache" if home else Path(platformdirs.user_cache_dir("autofit"))
    # The card itself: "cuda:0" is another one under another CUDA_VISIBLE_DEVICES.
    card = torch.cuda.get_device_properties(device) if device.type == "cuda" else "cpu"
    asked = [f.name for f in fields(Device)]  # what an older autofit did not measure is measured
    facts = [platform.node(), str(card), asked, *sorted(versions(device).items())]
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return folder / "devices" / f"{device.type}-{key}.json"


def _processor() -> str:
    model = next(
        (line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    return f"{model} x{os.cpu_count()}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _seconds(device: torch.device, work: Callable[[], object], repeats: int = 5) -> float:
    """The fastest of a few runs, after one that warms up: rates are limits, not averages."""
    work()
    return min(memory.timed(device, work) for _ in range(repeats))


def _copy_rates(device: torch.device) -> tuple[float, float, float]:
    """Host to device from pinned and from pageable memory; device to device, read plus written."""
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    pageable = torch.empty(COPY_BYTES, dtype=torch.uint8).fill_(1)
    pinned = pageable.pin_memory()
    other = torch.empty_like(there)
    return (
        COPY_BYTES / _seconds(device, lambda: there.copy_(pinned, non_blocking=True)),
        COPY_BYTES / _seconds(device, lambda: there.copy_(pageable)),
        2 * COPY_BYTES / _seconds(device, lambda: other.copy_(there)),
    )


def _host_rates(device: torch.device) -> tuple[float, float, float]:
    source = torch.empty(COPY_BYTES // 4, dtype=torch.uint8).fill_(1)
    target = torch.empty_like(source)
    copied_s = 2 * source.numel() / _seconds(device, lambda: target.copy_(source))
    return copied_s, copied_s, copied_s


def _matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    side = MATRIX_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _seconds(device, lambda: left @ right, repeats=3)


def _answering(device: torch.device) -> Iterator[Kernel]:
    """Run every kernel once for each dtype and head size: an import that works proves nothing."""
    attempts = {name: _sdpa_attempt(backend) for name, backend in SDPA_KERNELS.items()}
    if device.type == "cuda":
        others = {"xformers": _xformers_attempt(), "sage": _sage_attempt()}
        attempts |= {name: attempt for name, attempt in others.items() if attempt is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SDPA warns why a kernel refused; here that is the answer
        for name, attempt in attempts.items():
            for dtype in DTYPES:
                for size in HEAD_SIZES:
                    if _works(attempt, device, dtype, size):
                        yield Kernel(name, str(dtype).removeprefix("torch."), size)


def _works(
    attempt: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    size: int,
) -> bool:
    query = torch.randn(1, 64, 2, size, device=device).to(dtype)  # batch, tokens, heads, head size
    try:
        return bool(attempt(query).isfinite().all())
    except Exception:  # other people's kernels: "No available kernel", a bare assert, no compiler
        return False


def _sdpa_attempt(backend: SDPBackend) -> Callable[[torch.Tensor], torch.Tensor]:
    def attempt(query: torch.Tensor) -> torch.Tensor:
        heads_first = query.transpose(1, 2)
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(heads_first, heads_first, heads_first)

    return attempt


def _xformers_attempt() -> Callable[[torch.Tensor], torch.Tensor] | None:
    try:
        from xformers import ops
    except (ImportError, OSError, RuntimeError):
        return None  # not installed, or its binaries are for another torch
    return lambda query: torch.as_tensor(ops.memory_efficient_attention(query, query, query))


def _sage_attempt() -> Callable[[torch.Tensor], torch.Tensor] | None:
    try:
        from sageattention import sageattn
    except (ImportError, OSError, RuntimeError):
        return None  # not installed, or without the triton that it needs

    def attempt(query: torch.Tensor) -> torch.Tensor:
        key = query.clone()  # version 1 writes into it
        with torch.cuda.device_of(query):  # where Triton launches
            return torch.as_tensor(sageattn(query, key, query, tensor_layout="NHD"))

    return attempt
