"""A pipe's own call, made again where it ran out of memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_leaves

from autofit import anatomy
from autofit.trial import is_out_of_memory


class Leaner(Protocol):
    """What there is to do before a call, and after one that ran out of memory. ``lock`` is held
    by the call under way."""

    lock: RLock

    def before_call(self) -> None: ...

    def can_step_down(self) -> bool: ...

    def step_down(self, error: str) -> None:
        """Make the next call need less. Whatever the failed one held is free to be collected."""


@contextmanager
def retrying(pipe: Any, leaner: Leaner) -> Iterator[None]:
    """Inside, a call of the pipe that runs out of memory begins again, after a step down, with the
    generators as it found them; the error is the caller's where there is no step left."""
    found = type(pipe)

    @functools.wraps(found.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with leaner.lock:  # a scheduler is at one step only
            rewind = _rewinder((args, kwargs))
            while True:
                leaner.before_call()
                try:
                    return found.__call__(self, *args, **kwargs)
                except Exception as error:
                    if not _ran_out(error) or not leaner.can_step_down():
                        raise
                    reason = str(error)
                # Out of the except block: the traceback keeps the failed call's tensors alive.
                leaner.step_down(reason)
                rewind()

    with anatomy.methods(pipe, {"__call__": call}):
        yield


def _ran_out(error: Exception) -> bool:
    """Of the device's memory: a leaner plan may need more of the host's."""
    return is_out_of_memory(error) and "can't allocate memory" not in str(error)


def _rewinder(arguments: Any) -> Callable[[], None]:
    """What puts the generators among the arguments, and torch's own, back to where they are now."""
    given = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Generator)]
    states = [(generator, generator.get_state()) for generator in given]
    host_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def rewind() -> None:
        for generator, state in states:
            generator.set_state(state)
        torch.set_rng_state(host_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)

    return rewind
