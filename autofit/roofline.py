"""Operations counted -> seconds on a device. Plain arithmetic, no torch.

A roofline for each operation: ``max(operations / rate, bytes / bandwidth)``, summed; and what
the host needs to launch them all, which bounds small work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from autofit.spec import Device

# Convolutions, and attention of heads too wide for cuDNN and flash, reach a share of the products'
# rate, and at most so many operations a clock of an SM: all that a GeForce's tensor cores do, 512,
# but half of a V100's and a third of an A100's. Hopper has kernels of its own. Fitted to trials of
# an H200 and an H100 (tests/golden), and to what others published (tests/golden/published.toml).
GENERAL_SHARE, GENERAL_CLOCK, HOPPER_GENERAL_CLOCK = 0.9, 520, 1200
# Attention's exponentials take their turn with its products, on units that do 16 a clock of an SM,
# each for two products of a head (Shah et al., FlashAttention-3, arXiv 2407.08608). A head fills
# whole tiles of the products: 40 costs 64. Before Ampere neither flash nor cuDNN has a kernel.
FUSED_HEAD, HEAD_TILE, EXPONENTIALS_CLOCK, EFFICIENT_SHARE = 256, 64, 16, 0.35
AMPERE, HOPPER, LATER_GEFORCE = (8, 0), (9, 0), (12, 0)
# cuDNN convolves float32 in TF32 unless told otherwise, from Ampere on: half as fast as float16.
TF32_SHARE = 0.5
# Of 2 operations a clock and core an H200 reached so much in float32 products. With the cores of an
# SM (CUDA programming guide, arithmetic instructions) this tells a device's clocks.
FLOAT32_SHARE, FLOAT32_CORES, FEWER_CORES = 0.765, 128, 64
WITH_FEWER_CORES = ((7, 0), (7, 2), (7, 5), (8, 0))
# Of the bandwidth that a copy of 256 MiB reaches, what a model's kernels and layout copies do.
BANDWIDTH_SHARE = 0.62
KERNEL_S = 5e-6  # the least that one kernel takes on a GPU
# Group norm takes the moments of a group in one block of 512 threads, and each waits 0.3 us for an
# element (aten/.../cuda/group_norm_kernel.cu). An image has 32 groups: on an H100 that is a third
# of a decode of one image, 0.096 s where four images of as many pixels together take 0.068.
ROW_ELEMENTS_S = 1.6e9
# What ``Device.launch_s`` is for: a module called, its checks and hooks, and its kernel.
MODULES = frozenset({
    "mm", "addmm", "bmm", "baddbmm", "convolution", "native_layer_norm", "native_group_norm",
    "rms_norm", "gelu", "silu", "embedding",
})  # fmt: skip
# Sums and products between tensors come without a module. Denoisers made so narrow that an EPYC
# waited for Python alone took, for one operation of a module counted so: SDXL 19 us, SD 1.5 21,
# PixArt 16, SD3 and FLUX 14; for one of all operations 12, 12, 8, 6 and 7. A share of 0 to 0.1 fits
# these best; a GPU's launch comes on top, and FLUX's encoders took 0.03 s on the H200: that is 0.3.
BARE_SHARE = 0.15
# Part of a convolution's call: cuDNN's copies, and the bias.
WITHIN = frozenset({"layout", "add_"})
# What cuBLAS works in, by torch's own rule: taken at the first product, and kept.
BLAS_BYTES, HOPPER_BLAS_BYTES = 8_519_680, 33_554_432


@dataclass(frozen=True)
class Operation:
    """Equal operations of one phase; ``flops`` and ``moved_bytes`` are of one of them."""

    name: str  # of the ATen operator; "attention" and "rms_norm" are single kernels, as on CUDA
    dtype: str
    flops: int
    moved_bytes: int  # read plus written
    count: int
    head_size: int = 0  # of attention
    row_size: int = 0  # of group norm: elements that one block of threads reads


@dataclass(frozen=True)
class PhaseFacts:
    """What one run of a phase needs.

    ``activation_bytes`` are live at once at most, beside the weights: tensors, and the copies that
    cuDNN works in where a convolution's input is not channels-last. ``tensor_bytes`` are without
    these copies. An allocator's rounding and ``blas_bytes`` come on top.
    """

    activation_bytes: int
    tensor_bytes: int
    operations: tuple[Operation, ...]

    @property
    def flops(self) -> int:
        return sum(o.flops * o.count for o in self.operations)

    @property
    def moved_bytes(self) -> int:
        return sum(o.moved_bytes * o.count for o in self.operations)

    @property
    def launches(self) -> int:
        return sum(o.count for o in self.operations)


def blas_bytes(device: Device) -> int:
    """Workspace of matrix products, of the allocator's, in every phase."""
    if device.kind != "cuda":
        return 0
    return HOPPER_BLAS_BYTES if _since(HOPPER, device) else BLAS_BYTES


def seconds(facts: PhaseFacts, device: Device, hooks_s: float = 0.0) -> float:
    """Seconds of one run of a phase, its weights on the device and nothing else to do there.

    Launching, and what hooks take of the host besides, runs ahead of a GPU, so the longer of the
    two counts; on the CPU their sum.
    """
    both_s = busy_s(facts, device), launching_s(facts, device) + hooks_s
    return max(both_s) if device.kind == "cuda" else sum(both_s)


def busy_s(facts: PhaseFacts, device: Device) -> float:
    """Seconds that one run of a phase keeps the device busy."""
    return sum(o.count * operation_s(o, device) for o in facts.operations)


def launching_s(facts: PhaseFacts, device: Device) -> float:
    """Seconds that the host needs to launch one run of a phase."""
    return calls(facts) * device.launch_s


def attention_share(facts: PhaseFacts, device: Device) -> float:
    """Of the seconds that a phase keeps the device busy, those in attention."""
    spent = {o: o.count * operation_s(o, device) for o in facts.operations}
    attending_s = sum(s for o, s in spent.items() if o.name == "attention")
    return attending_s / sum(spent.values()) if spent else 0.0


def calls(facts: PhaseFacts) -> float:
    """The operations of a phase, in operations of modules by what the host needs for them."""
    return sum(o.count * _calls(o.name) for o in facts.operations)


def _calls(name: str) -> float:
    if name in WITHIN:
        return 0.0
    return 1.0 if name in MODULES else BARE_SHARE


def operation_s(operation: Operation, device: Device) -> float:
    """Seconds that one of these operations keeps the device busy."""
    computing_s = operation.flops / rate(operation, device)
    moving_s = operation.moved_bytes / (BANDWIDTH_SHARE * device.memory_bytes_s)
    if device.kind != "cuda":
        return max(computing_s, moving_s)
    return max(computing_s, moving_s + operation.row_size / ROW_ELEMENTS_S, KERNEL_S)


def rate(operation: Operation, device: Device) -> float:
    """Floating-point operations a second that a model's kernels of this sort reach."""
    slowest = min(device.flops_s.values())
    plain = device.flops_s.get(operation.dtype, slowest)
    if operation.name == "attention":
        return _attention_rate(operation.head_size, plain, device)
    if operation.name == "convolution":
        if operation.dtype == "float32" and _since(AMPERE, device):
            plain = max(plain, TF32_SHARE * device.flops_s.get("float16", plain))
        return _general_rate(plain, device)
    return plain


def _attention_rate(head_size: int, plain: float, device: Device) -> float:
    if head_size > FUSED_HEAD:
        return _general_rate(plain, device)
    products = plain * _filled(head_size)
    if device.kind != "cuda":
        return products
    if not _since(AMPERE, device):
        return EFFICIENT_SHARE * products
    exponentials_s = 1 / (EXPONENTIALS_CLOCK * _clocks_s(device))
    return 1 / (1 / products + exponentials_s / (4 * head_size))


def _general_rate(plain: float, device: Device) -> float:
    if device.kind != "cuda":
        return GENERAL_SHARE * plain
    is_hopper = _since(HOPPER, device) and not _since(LATER_GEFORCE, device)
    clock = HOPPER_GENERAL_CLOCK if is_hopper else GENERAL_CLOCK
    return min(GENERAL_SHARE * plain, clock * _clocks_s(device))


def _since(capability: tuple[int, int], device: Device) -> bool:
    return (device.capability or (0, 0)) >= capability


def _clocks_s(device: Device) -> float:
    """Clocks a second, of all SMs together."""
    cores = FEWER_CORES if device.capability in WITH_FEWER_CORES else FLOAT32_CORES
    return device.flops_s["float32"] / (2 * FLOAT32_SHARE * cores)


def _filled(head_size: int) -> float:
    """Of the kernel's tile, what a head fills: a head of 40 takes the time of one of 64."""
    return head_size / (HEAD_TILE * math.ceil(head_size / HEAD_TILE)) if head_size else 1.0
