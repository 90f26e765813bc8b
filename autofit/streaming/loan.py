"""Memory that the VAE works in, and that weights of the denoiser lie in meanwhile."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_map_only


class Loan:
    """One stretch of device memory with two users, one at a time: who takes it, and what runs in
    ``lent``, once it was given back.

    On CUDA both have it from a memory pool of their own, so that nothing else comes to lie there:
    it is the same stretch each time, which CUDA graphs rely on, and what the VAE needs beyond it
    stays in the pool too.
    """

    def __init__(self, device: torch.device, size_bytes: int) -> None:
        self._device, self.size_bytes = device, size_bytes
        self._pool: torch.cuda.MemPool | None = None
        self._memory: torch.Tensor | None = None

    @property
    def is_taken(self) -> bool:
        return self._memory is not None

    def take(self) -> torch.Tensor:
        """The memory, as bytes; of the current stream.

        Raises:
            torch.OutOfMemoryError: the device does not hold it.
        """
        if self._memory is None:
            with self._allocating():
                self._memory = torch.empty(self.size_bytes, dtype=torch.uint8, device=self._device)
        return self._memory

    def give_back(self) -> None:
        """Whoever took it holds no view of it any more."""
        if self._device.type == "cuda":
            # What cuBLAS and cuBLASLt keep for good, and a capture frees, must not lie here.
            square = torch.ones(16, 16, device=self._device)
            torch.addmm(square, square, square)
            torch.nn.functional.linear(square, square, square[0])
        self._memory = None

    def close(self) -> None:
        self._memory = None
        if self._pool is not None:
            self._pool = None
            torch.cuda.empty_cache()

    def lent(self, found: Callable[..., Any]) -> Callable[..., Any]:
        """A forward whose activations lie in this memory; its results do not."""

        @functools.wraps(found)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self._allocating():
                out = found(*args, **kwargs)
            if self._device.type == "cuda":
                out = tree_map_only(torch.Tensor, torch.Tensor.clone, out)
            return out

        return forward

    @contextmanager
    def _allocating(self) -> Iterator[None]:
        if self._device.type != "cuda":
            yield
            return
        self._pool = self._pool or torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(self._pool, self._device):
            yield
