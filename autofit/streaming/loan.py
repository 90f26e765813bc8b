"""Memory that the VAE works in, and that weights of the denoiser lie in meanwhile."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only


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
        self._shapes: set[tuple[torch.Size, ...]] = set()  # that were seen
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
            if self._device.type == "cuda" and self._pool is None:
                torch.cuda.empty_cache()  # as in ``_make_room``
            with self._allocating():
                self._memory = torch.empty(self.size_bytes, dtype=torch.uint8, device=self._device)
        return self._memory

    def give_back(self) -> None:
        """Whoever took it holds no view of it any more."""
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
            self._make_room((args, kwargs))
            with self._allocating():
                out = found(*args, **kwargs)
            if self._device.type == "cuda":
                out = tree_map_only(torch.Tensor, torch.Tensor.clone, out)
            return out

        return forward

    def _make_room(self, inputs: Any) -> None:
        """Once for inputs of these shapes: the pool may have to grow, and while something allocates
        from it torch does not give up what it has cached elsewhere."""
        shapes = tuple(t.shape for t in tree_leaves(inputs) if isinstance(t, torch.Tensor))
        if self._device.type == "cuda" and shapes not in self._shapes:
            self._shapes.add(shapes)
            torch.cuda.empty_cache()

    @contextmanager
    def _allocating(self) -> Iterator[None]:
        if self._device.type != "cuda":
            yield
            return
        if self._pool is None:
            with torch.cuda.device(self._device):  # whose pool it is
                self._pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(self._pool, self._device):
            yield
