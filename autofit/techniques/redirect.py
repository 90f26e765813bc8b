"""Operators that compute attention, and what calls them in torch's place in one model.

That the operators are registered is all that is left of them in a process. This file loads torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention.flex_attention import flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from autofit import anatomy
from autofit.spec import BadInput
from autofit.techniques.redirected import FLEX_HEAD, sage_head

# What SageAttention's kernels in Triton (all of version 1) take at a time: to them, keys that are
# missing from the last block are there, and zero.
SAGE_KEYS = 64


@dataclass(frozen=True)
class Kernel:
    """``compute`` takes queries, keys and values of (batch, heads, tokens, head size), where
    ``takes`` says so of queries and keys."""

    name: str
    compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    takes: Callable[[torch.Tensor, torch.Tensor], bool]


@contextmanager
def redirected(denoiser: nn.Module, kernel: Kernel) -> Iterator[None]:
    """Let a kernel compute the attention of this model that it takes.

    Raises:
        BadInput: the model has no layers of attention that we know.
    """
    layers = [m for m in denoiser.modules() if hasattr(m, "processor")]
    if not layers:
        raise BadInput(
            f"{type(denoiser).__name__} has no attention that {kernel.name} can compute;"
            " choose another attention technique"
        )
    with ExitStack() as stack:
        for layer in layers:
            forward = _redirected(layer.forward, kernel)
            stack.enter_context(anatomy.attribute(layer, "forward", forward))
        yield


def _redirected(found: Callable[..., Any], kernel: Kernel) -> Callable[..., Any]:
    """Around a layer and not around the model: the mode costs each of torch's functions 1 us."""

    @functools.wraps(found)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Redirect(kernel):
            return found(*args, **kwargs)

    return forward


class _Redirect(TorchFunctionMode):
    """While this is entered, a kernel computes the attention of this thread that it takes."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and _plain(*args, **kwargs):
            query, key, value = _operands(*args, **kwargs)
            if self.kernel.takes(query, key):
                return self.kernel.compute(query, key, value)
        if func is torch.Tensor.unflatten:  # the one method that dynamo cannot trace under a mode
            func = torch.unflatten
        return func(*args, **kwargs)


def _operands(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> tuple[Any, Any, Any]:
    return query, key, value


def _plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> bool:  # fmt: skip
    """Whether all queries of a head see all of its own keys, and nobody records what is done."""
    if attn_mask is not None or dropout_p or is_causal or scale is not None or query.ndim != 4:
        return False
    same_heads = query.shape[:2] == key.shape[:2] and query.shape[3] == key.shape[3]
    same_dtype = query.dtype == key.dtype == value.dtype
    return same_heads and key.shape == value.shape and same_dtype and not _recorded(query)


def _recorded(query: torch.Tensor) -> bool:
    """For gradients, or by a mode, under which no kernel can be compiled. One that compiles what is
    around goes on."""
    if torch.is_grad_enabled() and query.requires_grad:
        return True
    return not torch.compiler.is_compiling() and is_in_torch_dispatch_mode()


# ---------------------------------------------------------------- operators


@functools.cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    """Each shape has a kernel of its own. Without compilation it would hold all scores."""
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@torch.library.custom_op("autofit::flex_attention", mutates_args=())
def flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """For ``torch.jit.trace``, which records no kernels of others."""
    return _compiled_flex()(query, key, value)


@flex.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(query)


@torch.library.custom_op("autofit::sage_attention", mutates_args=())
def sage(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """An operator besides for ``torch.compile``, which need not understand what is in it."""
    from sageattention import sageattn

    size = query.shape[-1]
    room = 0, sage_head(size) - size
    # This copies, also where there is nothing to pad: version 1 writes into the keys that it gets.
    padded = (functional.pad(t, room) for t in (query, key, value))
    with torch.cuda.device_of(query):  # where Triton launches
        out: torch.Tensor = sageattn(*padded, sm_scale=size**-0.5)
    return out[..., :size]


@sage.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    size = query.shape[-1]
    return query.new_empty((*query.shape[:-1], sage_head(size)))[..., :size]


def _flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    inside = torch.compiler.is_compiling()  # then it is compiled with what stands around it
    out: torch.Tensor = (flex_attention if inside else flex)(query, key, value)
    return out


def _flex_takes(query: torch.Tensor, key: torch.Tensor) -> bool:
    return query.is_cuda and query.shape[-1] >= FLEX_HEAD


def _sage_takes(query: torch.Tensor, key: torch.Tensor) -> bool:
    whole_blocks = key.shape[2] % SAGE_KEYS == 0
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and half and sage_head(query.shape[-1]) > 0 and whole_blocks


FLEX = Kernel("FlexAttention", _flex, _flex_takes)
SAGE = Kernel("SageAttention", sage, _sage_takes)
