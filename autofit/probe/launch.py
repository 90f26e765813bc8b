"""What the host needs to launch an operation of a model: Python, diffusers, torch, the driver."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

# Work too small to keep any device busy: what is left is the host's.
WIDTH, HEADS, TOKENS = 16, 2, 4
# SDXL's own number: fewer lie in the processor's caches, and take half as long there (seen on an
# EPYC, 10 us with 12 blocks, 23 with 70; SDXL's UNet, made as narrow, took 23).
BLOCKS = 70
CALLS = 15.2  # of one block, as the roofline counts: its 14 modules, and a share of 8 other kernels
ROUNDS, LIMIT_S = 5, 0.3


class _Blocks(nn.Module):
    """diffusers' own: how a model calls its modules is most of what a launch takes."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers.models.attention import BasicTransformerBlock

        self.blocks = nn.ModuleList(
            BasicTransformerBlock(WIDTH, HEADS, WIDTH // HEADS, cross_attention_dim=WIDTH)
            for _ in range(BLOCKS)
        )

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, encoder_hidden_states=text)
        return x


def launch_s(device: torch.device) -> float:
    """Seconds of the host for one operation of a module (``Device.launch_s``); takes some 0.3 s.

    The fastest of a few rounds, like the other rates. A CUDA device is done with these kernels as
    fast as they come, so the host waits for no room in its queue.
    """
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    with torch.random.fork_rng(devices=[]):  # whoever asks gets the numbers that he would have got
        blocks = _Blocks().eval().to(device, dtype)
        x, text = (torch.randn(1, TOKENS, WIDTH).to(device, dtype) for _ in range(2))
    taken_s: list[float] = []
    with torch.no_grad(), _one_thread():
        blocks(x, text)
        while len(taken_s) < ROUNDS and sum(taken_s) < LIMIT_S:
            _finish(device)
            start = time.perf_counter()
            blocks(x, text)
            taken_s.append(time.perf_counter() - start)
        _finish(device)
    return min(taken_s) / (BLOCKS * CALLS)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Where others keep all processors busy, small operations on the CPU would wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
