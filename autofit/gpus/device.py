"""A card of the table -> Device: the vendor's figures, times what is reached of them.

The shares below were measured on one H200 (torch 2.11, CUDA 13.0; the probes are beside the trials
in tests/golden/trials), but for half precision's, which others' measurements tell too. They are
applied to every card. A laptop that gives its card less power than it can take is slower than its
row, and a slot with fewer lanes too.
"""

from __future__ import annotations

from collections.abc import Iterator

from autofit.gpus.table import Gpu, find
from autofit.roofline import FLOAT32_SHARE
from autofit.spec import HEAD_SIZES, Device, Kernel
from autofit.units import GIB

SOURCE = "GPU table: vendor's figures, times what is reached of such; not measured here"

# Of products of 4096x4096 an H200 reached 51.2 of 66.9 TFLOP/s in float32, and 0.70 to 0.74 of 989
# in half precision, 4096 operations a clock of an SM. Others had 0.81 to 0.87 of an A100's 2048
# (MAMF of https://github.com/stas00/ml-engineering) and 0.88 to 0.96 of an L20's 512 (hgemm of
# https://github.com/DefTruth/CUDA-Learn-Notes).
FED_CLOCK = 10_500
MEMORY_SHARE = 0.86  # copies on the device, read plus written: 4.08 to 4.18 of 4.8 TB/s
PINNED_SHARE = 0.88  # 55.3 to 55.5 of PCIe 5.0 x16's 63.0 GB/s
# The host's own copy into a page-locked buffer is the limit, not the bus: 6.5 to 8.4 GB/s measured.
PAGEABLE_BYTES_S = 7.5e9

# What torch sees of the memory as sold, on Linux: 139.8 of 141 GiB on the H200, 47.37 of 48 on an
# RTX 6000 Ada, 23.6 of 24 on an RTX 4090, 7.5 to 7.8 of 8 and 5.8 of 6 on GeForce cards (reports of
# users). Windows reports all of it, and gives out less.
RESERVED_BYTES = int(0.3 * GIB)
RESERVED_SHARE = 0.007
ECC_SHARE = 1 / 16  # 44.4 of 48 GiB is what torch sees where it is on

# A context holds a base, and stacks for every thread that can be resident: 0.55 to 0.65e9 bytes on
# an H200 (132 SMs of 2048), 0.45e9 on an RTX 6000 Ada (142 of 1536). How the two parts divide on a
# small card is assumed: nobody measured one here.
CONTEXT_BASE_BYTES = 150_000_000
CONTEXT_THREAD_BYTES = 1_600

# The host of a card that is not at hand is not known: assumed. What it takes to launch an operation
# is taken to be as on the H200's host (``spec.LAUNCH_S``).
HOST_BYTES = 32 * GIB

# A desktop keeps its compositor's and windows' buffers on the card that drives it. Assumed, on the
# safe side for a desktop with a browser; a data-centre card drives no screen.
DESKTOP_BYTES = 1_000_000_000

DTYPES = ("float16", "bfloat16", "float32")
HALF = ("float16", "bfloat16")
AMPERE, HOPPER = (8, 0), (9, 0)


def device_for(
    name: str, *, memory_bytes: int | None = None, host_limit_bytes: int = HOST_BYTES
) -> Device:
    """Return the Device of a card by name, as ``probe_device`` would where it is plugged in.

    ``versions`` has no versions: ``source`` says that nothing here was measured on the card,
    ``figures`` whose figures they are. ``memory_bytes`` tells cards of one name apart.

    Raises:
        BadInput: no such card in the table, or more than one.
    """
    gpu = find(name, memory_bytes)
    pinned_s = PINNED_SHARE * gpu.bus_bytes_s
    return Device(
        kind="cuda",
        name=gpu.name,
        total_bytes=visible_bytes(gpu),
        capability=gpu.capability,
        context_bytes=CONTEXT_BASE_BYTES + CONTEXT_THREAD_BYTES * gpu.sms * gpu.threads,
        host_limit_bytes=host_limit_bytes,
        pinned_bytes_s=pinned_s,
        pageable_bytes_s=min(pinned_s, PAGEABLE_BYTES_S),
        memory_bytes_s=MEMORY_SHARE * gpu.memory_bytes_s,
        flops_s=_flops_s(gpu),
        kernels=tuple(_kernels(gpu.capability)),
        versions={"source": SOURCE, "figures": gpu.source},
    )


def visible_bytes(gpu: Gpu) -> int:
    """What torch sees of the card's memory: ``total_memory`` of its properties, about."""
    sold_bytes = gpu.memory_bytes * (1 - ECC_SHARE if gpu.ecc else 1.0)
    return int(sold_bytes * (1 - RESERVED_SHARE)) - RESERVED_BYTES


def desktop_bytes(gpu: Gpu) -> int:
    """What a desktop takes of the card before any work of ours."""
    return DESKTOP_BYTES if gpu.desktop else 0


def _flops_s(gpu: Gpu) -> dict[str, float]:
    """Only dtypes that the card has a rate for; a reader takes the slowest for the others."""
    stated = {
        "float16": gpu.fp16_flops_s,
        "bfloat16": gpu.bf16_flops_s,
        "float32": gpu.fp32_flops_s,
    }
    shares = {"float32": FLOAT32_SHARE} | dict.fromkeys(HALF, _half_share(gpu))
    held = gpu.sustained_hz / gpu.boost_hz
    return {d: held * shares[d] * rate for d, rate in stated.items() if rate is not None}


def _half_share(gpu: Gpu) -> float:
    """Of the tensor cores' rate: the more they do in a clock, the less of it can be fed."""
    if gpu.fp16_flops_s is None:
        return 1.0
    return 1 / (1 + gpu.fp16_flops_s / (gpu.sms * gpu.tensor_hz) / FED_CLOCK)


def _kernels(capability: tuple[int, int]) -> Iterator[Kernel]:
    """The attention kernels that answer, by torch's own rules (aten/.../cuda/sdp_utils.cpp)."""
    for dtype in DTYPES:
        for size in HEAD_SIZES:
            for name in ("cudnn", "flash", "efficient", "math"):
                if _answers(name, dtype, size, capability):
                    yield Kernel(name, dtype, size)


def _answers(name: str, dtype: str, size: int, capability: tuple[int, int]) -> bool:
    half, ampere = dtype in HALF, capability >= AMPERE
    if name == "cudnn":  # the larger heads on Hopper alone
        largest = 256 if capability == HOPPER else 128
        return half and ampere and size % 8 == 0 and size <= largest
    if name == "flash":
        return half and ampere and size <= 256
    if name == "efficient":  # tensor cores read 16 bytes at once
        return (size % 8 == 0 or not half) and (ampere or dtype != "bfloat16")
    return True
