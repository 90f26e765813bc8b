"""Partial residency of the weights of whole components: what fits stays, the rest streams.

The first forward of a component is recorded: its weights come one operation at a time. Once the
denoiser was recorded, one pool of device memory is taken for all: weights that must stay, resident
units, and the arena through which the other units stream. A later forward of the denoiser is timed,
and the units are chosen anew. From then on nothing is allocated, and the host never waits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from autofit import anatomy
from autofit.pinning import host_registered
from autofit.spec import Role
from autofit.streaming.clock import timing
from autofit.streaming.doors import opened
from autofit.streaming.lanes import lane_for
from autofit.streaming.loan import Loan
from autofit.streaming.pack import pack
from autofit.streaming.parts import Part, parts, unit_bytes_for
from autofit.streaming.pool import Pool
from autofit.streaming.record import recording
from autofit.streaming.replay import Moving
from autofit.streaming.script import Script
from autofit.streaming.units import divide


class Streamer:
    """Streams parts through ``pool_bytes`` of device memory, in units of ``unit_bytes`` or of one
    layer. One part keeps: the denoiser. ``lenders`` run in the loan, if there is one."""

    def __init__(
        self,
        parts: Sequence[Part],
        lenders: Sequence[nn.Module],
        device: torch.device,
        pool_bytes: int | None,
        loan_bytes: int,
        unit_bytes: int,
    ) -> None:
        self._parts, self._device, self._unit_bytes = parts, device, unit_bytes
        self._lane = lane_for(device)
        self._script = Script()
        self._loan = Loan(device, loan_bytes) if loan_bytes and lenders else None
        self._lenders = lenders if self._loan else ()
        self._pool = Pool(device, pool_bytes, self._lane, self._script, self._loan)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Take over the forwards of all parts. On exit the weights are in host memory again.

        Whoever made a forward that replays CUDA graphs (its ``graphs``) is told of the weights.
        """
        with ExitStack() as undo:
            for part in self._parts:
                streams = set(map(id, part.parameters))
                undo.enter_context(opened(part.module, streams, self._unit_bytes, self._device))
            undo.callback(self._pool.close)
            for part in self._parts:
                undo.enter_context(_saved_whole(part))
                forward = self._forward(part, part.module.forward)
                if part.keeps and (graphs := getattr(part.module.forward, "graphs", None)):
                    retimed = functools.partial(self._retimed, part)
                    moving = Moving(part, self._pool, self._lane, retimed)
                    undo.enter_context(anatomy.attribute(graphs, "weights", moving))
                undo.enter_context(anatomy.attribute(part.module, "forward", forward))
            for module in self._lenders:
                forward = self._lending(module.forward)
                undo.enter_context(anatomy.attribute(module, "forward", forward))
            yield

    def _forward(self, part: Part, found: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(found)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._script.begin(part)
            if not part.recorded or not self._pool.is_open:
                return self._recorded(part, lambda: found(*args, **kwargs))
            if part.keeps:
                self._pool.borrow()
            part.forwards += 1
            if part.keeps and part.awaits_timing:
                return self._timed(part, lambda: found(*args, **kwargs))
            return found(*args, **kwargs)

        return forward

    def _lending(self, found: Callable[..., Any]) -> Callable[..., Any]:
        assert self._loan is not None
        run = self._loan.lent(found)

        @functools.wraps(found)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._pool.give_back()
            return run(*args, **kwargs)

        return forward

    def _recorded(self, part: Part, run: Callable[[], Any]) -> Any:
        hosts = [(w.parameter, w.host) for w in part.weights]
        with recording(part.module, hosts, self._device) as record:
            out = run()
        if not part.recorded:
            part.division = divide(part.module, part.weights, record, self._unit_bytes)
        if part.keeps or self._pool.is_open:
            self._arrange(part)
        part.recorded = True
        return out

    def _timed(self, part: Part, run: Callable[[], Any]) -> Any:
        with timing(part.division.order, self._lane) as clock:
            out = run()
        times_s = clock.times_s()
        if times_s is not None:
            part.times_s = times_s
            self._arrange(part)
        return out

    def _retimed(self, part: Part, times_s: list[float]) -> None:
        """By graphs, which nothing waits for; the next one is captured at once."""
        part.times_s = times_s
        self._arrange(part)
        self._pool.settle()
        self._pool.borrow()

    def _arrange(self, latest: Part) -> None:
        self._pool.arrange([p for p in self._parts if p.recorded or p is latest], latest)


@contextmanager
def streaming(
    pipe: Any,
    device: torch.device,
    weights_bytes: int | None,
    loan_bytes: int | None = 0,
    *,
    unit_bytes: int | None = None,
    locks: bool = True,
) -> Iterator[None]:
    """Run a pipe with at most ``weights_bytes`` of its weights on the device; None: the least.

    While the denoiser runs ``loan_bytes`` more are there, in memory that the VAE works in; None:
    four units. The VAE may need more than these, and what it needs it keeps.

    ``locks``: page-lock the others in host memory, the small ones side by side; else all are copied
    from where they lie. Buffers and weights below a 512th of a unit stay on the device and count.
    On exit all weights are in host memory: the same bits, the small ones of a CUDA device in other
    memory, side by side.
    """
    components = anatomy.modules(pipe)
    modules = list(components.values())
    vaes = {n: m for n, m in components.items() if anatomy.role(n) is Role.VAE}
    lenders = [entry for name, module in vaes.items() for entry in anatomy.entries(name, module)]
    largest_bytes = max(sum(t.nbytes for _, _, t in anatomy.tensors(m)) for m in modules)
    unit_bytes = unit_bytes or unit_bytes_for(largest_bytes)
    found = parts(pipe, unit_bytes)
    moving = {id(p) for part in found for p in part.parameters}
    with ExitStack() as undo:
        for module in modules:
            undo.enter_context(anatomy.weights_held(module, without=moving))
        undo.enter_context(_weighed(found, modules, device, locks))
        settled_bytes = sum(_settle(m, device, moving) for m in modules)
        pool_bytes = None if weights_bytes is None else max(0, weights_bytes - settled_bytes)
        loan_bytes = 4 * unit_bytes if loan_bytes is None else loan_bytes
        streamer = Streamer(found, lenders, device, pool_bytes, loan_bytes, unit_bytes)
        undo.enter_context(streamer.running())
        yield


def _saved_whole(part: Part) -> AbstractContextManager[None]:
    hosts = {id(w.parameter): w.host for w in part.weights}
    found = anatomy.tensors(part.module)
    return anatomy.saved_as({(owner, n): hosts[id(p)] for owner, n, p in found if id(p) in hosts})


@contextmanager
def _weighed(
    found: Sequence[Part], modules: Sequence[nn.Module], device: torch.device, locks: bool
) -> Iterator[None]:
    """Make the weights that stream ready for it, and leave them all in host memory on exit."""
    locks = locks and device.type == "cuda"
    firsts = {id(next(m.parameters(), None)) for m in modules}
    for part in found if locks else ():
        pack(part.parameters)
    # first the part whose weights move every step, in case not all may be page-locked
    order = [p.module for p in sorted(found, key=lambda p: not p.keeps) if p.parameters]
    with host_registered(order, str(device)) if locks else nullcontext():
        try:
            for part in found:
                part.weigh(firsts, device)
            for weight in (w for part in found for w in part.weights):
                weight.parameter.data = weight.idle
            yield
        finally:
            for weight in (w for part in found for w in part.weights):
                weight.parameter.data = weight.host


def _settle(module: nn.Module, device: torch.device, moving: set[int]) -> int:
    """Bring to the device what does not move. Returns its bytes."""
    settled: dict[int, int] = {}  # tied weights have several owners
    for owner, name, tensor in anatomy.tensors(module):
        if id(tensor) in moving:
            continue
        there = tensor.data.to(device)
        settled[id(tensor)] = there.nbytes
        if name in owner._buffers:
            owner._buffers[name] = there
        else:
            tensor.data = there
    return sum(settled.values())
