"""Seconds and bytes by phase of one generation, read from outside the pipeline.

Every diffusers pipeline calls its denoiser, its scheduler's ``step`` and its VAE's ``decode``. The
first denoiser call ends encoding, each ``step`` ends a denoising step, ``decode`` begins decoding
(its bytes count from the end of its first layer): no callback, so it works for pipelines that have
none, and for any placement (hooks included).
"""

from __future__ import annotations

import functools
import re
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autofit import anatomy
from autofit.spec import Phase

OnStep = Callable[[int], None]


class Stopwatch:
    """Marks on the device's clock. CUDA marks are events: they cost no synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def between_s(self, first: int, last: int) -> float:
        """Seconds between two marks; waits for the later one."""
        begin, end = self.marks[first], self.marks[last]
        if self.device.type != "cuda":
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


class HostTracker(TorchDispatchMode):
    """Follows the storages of all tensors that operations make, as an allocator would.

    ``cap_bytes`` makes it refuse: the same error, at the same place, as a CUDA card of that size.
    """

    def __init__(self, cap_bytes: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cap_bytes = cap_bytes
        self.live_bytes = self.peak_bytes = 0
        self._known: dict[int, Any] = {}

    def follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size_bytes = storage._cdata, storage.nbytes()
        if key in self._known or size_bytes == 0:
            return
        if self.cap_bytes is not None and self.live_bytes + size_bytes > self.cap_bytes:
            raise torch.OutOfMemoryError(
                f"Tried to allocate {size_bytes} B;"
                f" {self.live_bytes} B of {self.cap_bytes} B in use"
            )
        self.live_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size_bytes))

    def _forget(self, key: int, size_bytes: int) -> None:
        if self._known.pop(key, None) is not None:
            self.live_bytes -= size_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.follow(leaf)
        return out


class Meter:
    """What one generation took. ``phase_bytes`` holds the live tensors' highest, by phase."""

    def __init__(self, pipe: Any, device: torch.device, tracker: HostTracker | None = None) -> None:
        self.pipe, self.device, self.tracker = pipe, device, tracker
        self.phase = Phase.ENCODE
        self.phase_bytes: dict[str, int] = {}
        self.reserved_bytes = 0  # the allocator's highest, all phases
        self.starved = 0  # allocations that were refused, and nobody raised it
        self._latents: list[torch.Tensor] = []  # that were decoded
        self._watch = Stopwatch(device)
        self._steps = 0
        self._decoding = False

    @contextmanager
    def running(self, on_step: OnStep | None = None) -> Iterator[None]:
        """Watch the generation made inside."""
        scheduler, vae = self.pipe.scheduler, anatomy.vae(self.pipe)
        with ExitStack() as stack:
            handle = anatomy.denoiser(self.pipe).register_forward_pre_hook(self._on_denoiser)
            stack.callback(handle.remove)
            step = self._wrapped_step(scheduler.step, on_step)
            stack.enter_context(anatomy.attribute(scheduler, "step", step))
            if vae is not None:
                decode = self._wrapped_decode(vae, vae.decode)
                stack.enter_context(anatomy.attribute(vae, "decode", decode))
            self._reset_peak()
            refused = self._refused()
            self._watch.mark()
            yield
            self._watch.mark()
            self._close_phase(self.phase)
            self.starved = self._refused() - refused

    def _on_denoiser(self, *_: Any) -> None:
        if self.phase is Phase.ENCODE:
            self._close_phase(Phase.STEP)
            self._watch.mark()

    def _wrapped_step(self, step: Callable[..., Any], on_step: OnStep | None) -> Callable[..., Any]:
        @functools.wraps(step)  # pipelines read its signature to know whether to pass a generator
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            out = step(*args, **kwargs)
            self._steps += 1
            self._watch.mark()
            if on_step is not None:
                on_step(self._steps)
            return out

        return wrapped

    def _wrapped_decode(self, vae: Any, decode: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(decode)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._close_phase(Phase.DECODE)
            tensors = (t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
            self._latents += islice(tensors, 1)
            with self._after_loan(vae):
                return decode(*args, **kwargs)

        return wrapped

    @contextmanager
    def _after_loan(self, vae: Any) -> Iterator[None]:
        """Count the decode from the end of its first layer, which works on latents: until it was
        entered, what the denoiser borrowed of its memory is there."""

        def after_first(*_: Any) -> None:
            handles.close()
            self._look_anew()

        with ExitStack() as handles:
            for entry in anatomy.entries("vae", vae):
                for layer in entry.modules():
                    if not any(layer.children()):
                        handles.callback(layer.register_forward_hook(after_first).remove)
            yield

    def _close_phase(self, following: Phase) -> None:
        live_bytes, _ = self._peaks()
        known_bytes = self.phase_bytes.get(self.phase.value, 0)
        self.phase_bytes[self.phase.value] = max(known_bytes, live_bytes)
        self.phase = following
        self._look_anew()

    def _look_anew(self) -> None:
        """For peaks; what the allocator had reserved counts all the same."""
        _, reserved_bytes = self._peaks()
        self.reserved_bytes = max(self.reserved_bytes, reserved_bytes)
        self._reset_peak()

    def _peaks(self) -> tuple[int, int]:
        if self.device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(self.device)
            return allocated, torch.cuda.max_memory_reserved(self.device)
        live_bytes = self.tracker.peak_bytes if self.tracker else 0
        return live_bytes, live_bytes

    def taken_latents(self) -> list[torch.Tensor]:
        """All latents that were decoded, decode by decode, in host memory; none where no VAE was
        asked. Copied only now, not while the time runs, and let go of."""
        found = [latents.cpu() for latents in self._latents]
        self._latents.clear()
        return found

    def _refused(self) -> int:
        """How often the allocator had no memory, in this process."""
        if self.device.type != "cuda":
            return 0
        return int(torch.cuda.memory_stats(self.device).get("num_ooms", 0))

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.tracker:
            self.tracker.peak_bytes = self.tracker.live_bytes

    @property
    def encode_s(self) -> float:
        return self._watch.between_s(0, 1)

    @property
    def step_s(self) -> tuple[float, ...]:
        return tuple(self._watch.between_s(i, i + 1) for i in range(1, self._steps + 1))

    @property
    def decode_s(self) -> float:
        return self._watch.between_s(self._steps + 1, self._steps + 2)

    def projected_s(self, steps: int) -> float:
        """Seconds of a whole generation without its decode, by three steps seen so far or more."""
        first_s = self._watch.between_s(0, 2)  # encode and first step
        return first_s + (steps - 1) * self.fastest_step_s()

    def fastest_step_s(self) -> float:
        """Of the steps seen so far, without the first, which carries transfers, and the last, so
        that it waits for no work still in the queue."""
        return min(self._watch.between_s(i, i + 1) for i in range(2, self._steps))


def tracked(pipe: Any, device: torch.device, cap_bytes: int | None) -> AbstractContextManager[Any]:
    """On the CPU: follow tensor memory, the pipe's weights included. On CUDA: nothing to do."""
    if device.type == "cuda":
        return nullcontext(None)
    tracker = HostTracker(cap_bytes)
    for module in anatomy.modules(pipe).values():
        for _, _, tensor in anatomy.tensors(module):
            tracker.follow(tensor)
    return tracker


_NO_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # of cuDNN, the host


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch's own, or a library's in its words."""
    said = str(error)
    words = isinstance(error, RuntimeError) and any(text in said for text in _NO_MEMORY)
    return isinstance(error, torch.OutOfMemoryError) or words


_ASKED = re.compile(r"Tried to allocate ([\d.]+) (GiB|MiB|KiB|B|bytes)")
_ASKED_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1, "bytes": 1}


def asked_bytes(error: BaseException) -> int:
    """What the allocation that failed asked for, from torch's message; 0 where it does not say."""
    match = _ASKED.search(str(error))
    return int(float(match[1]) * _ASKED_UNITS[match[2]]) if match else 0
