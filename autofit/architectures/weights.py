"""Random weights at the speed of memory: finite in half precision, the same for the same seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from autofit.anatomy import modules, tensors

# Elements of the block that is repeated. Prime, so that no two rows of a matrix come out equal.
BLOCK = 4_194_301
# Below one, for float16: schedules blow up the latents of a model that has learnt nothing (PixArt's
# by a few hundred), and the VAE reached a third of the largest float16 with a gain of one.
GAIN = 0.7

_Make = Callable[[str, torch.Size, torch.dtype], torch.Tensor]  # by a parameter's name


class _Noise:
    """One block of standard normal numbers, handed out round and round."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        generator = torch.Generator("cpu").manual_seed(seed)
        self._block = torch.randn(BLOCK, generator=generator, device="cpu").to(dtype)
        self._at = 0

    def fill(self, out: torch.Tensor, std: float) -> None:
        flat, done = out.view(-1), 0
        while done < flat.numel():
            count = min(BLOCK - self._at, flat.numel() - done)
            torch.mul(self._block[self._at : self._at + count], std, out=flat[done : done + count])
            done, self._at = done + count, (self._at + count) % BLOCK


def materialize(pipe: Any, dtype: torch.dtype, seed: int) -> None:
    """Give every meta parameter of the pipe a value in memory, cast as ``from_pretrained`` casts.

    Matrices, convolutions and embeddings are normal, with a standard deviation of GAIN/√fan-in;
    biases are zero, norms one: activations stay small at any depth. Buffers keep their values.
    """
    _remake(pipe, dtype, partial(_random, _Noise(seed, dtype)))


def cast(pipe: Any, dtype: torch.dtype) -> None:
    """Give every meta parameter of the pipe the dtype that ``materialize`` does, and no memory."""
    _remake(pipe, dtype, lambda _, shape, to: torch.empty(shape, dtype=to, device="meta"))


def _remake(pipe: Any, dtype: torch.dtype, make: _Make) -> None:
    for module in modules(pipe).values():
        _remake_module(module, dtype, make)
        module.eval()


def _remake_module(module: nn.Module, dtype: torch.dtype, make: _Make) -> None:
    if isinstance(module, PreTrainedModel):
        module.tie_weights()  # making parameters empty has parted those that were one
    wide = _kept_in_float32(module) if dtype is torch.float16 else set()
    made: dict[torch.Tensor, nn.Parameter] = {}
    for owner, name, old in list(tensors(module)):
        if name in owner._buffers:
            if old.is_floating_point() and name not in owner._non_persistent_buffers_set:
                owner._buffers[name] = old.to(dtype)
            continue
        if old not in made:
            to = torch.float32 if owner in wide else dtype
            made[old] = nn.Parameter(make(name, old.shape, to), old.requires_grad)
        owner._parameters[name] = made[old]


def _kept_in_float32(module: nn.Module) -> set[nn.Module]:
    """What loading in float16 leaves in float32: T5's ``wo`` overflows there."""
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return {m for path, m in module.named_modules() if not kept.isdisjoint(path.split("."))}


def _random(noise: _Noise, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    if len(shape) < 2:
        make = torch.zeros if name == "bias" else torch.ones
        return make(shape, dtype=dtype, device="cpu")
    out = torch.empty(shape, dtype=dtype, device="cpu")
    noise.fill(out, GAIN / math.sqrt(math.prod(shape[1:])))
    return out
