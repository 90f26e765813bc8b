"""Kernels of attention that `bench_attention.py` compares, each behind what imports or makes it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def sdpa(backend: SDPBackend, padded: int = 0) -> Attend:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        size = query.shape[-1]
        if padded:
            query, key, value = (functional.pad(t, (0, padded - size)) for t in (query, key, value))
        with sdpa_kernel(backend):
            out = functional.scaled_dot_product_attention(query, key, value, scale=size**-0.5)
        return out[..., :size]

    return attend


def flex() -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def triton() -> Attend:
    import triton_attention

    return triton_attention.attention


def xformers() -> Attend:
    from xformers import ops

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return ops.memory_efficient_attention(*(t.transpose(1, 2) for t in tensors)).transpose(1, 2)

    return attend


def sage() -> Attend:
    from autofit.techniques import redirect

    return redirect.sage


KERNELS: dict[str, Callable[[], Attend]] = {
    "cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
    "cudnn-48": lambda: sdpa(SDPBackend.CUDNN_ATTENTION, padded=48),
    "cudnn-64": lambda: sdpa(SDPBackend.CUDNN_ATTENTION, padded=64),
    "flash": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
    "efficient": lambda: sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "flex": flex,
    "triton": triton,
    "xformers": xformers,
    "sage": sage,
}
