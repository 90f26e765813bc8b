"""Which modules run in a forward, in which order, and which weights each of them uses.

The forward that is recorded is a real one. Its weights need not be on the device: each operation
that asks for one gets a copy that lives as long as the operation needs it.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_LEAVES = (int, float, str, torch.dtype, torch.device, torch.Size, torch.memory_format)
_NEVER: Any = (None, lambda: None)
_ATTRIBUTES = ("__get__", "__set__", "size", "dim", "stride", "numel", "is_floating_point")


@dataclass
class Record:
    """``calls``: the modules in the order in which they began. ``uses``: for each parameter, by
    ``id``, the modules (by ``id``) that were running when an operation used it."""

    calls: list[nn.Module] = field(default_factory=list)
    uses: dict[int, set[frozenset[int]]] = field(default_factory=lambda: defaultdict(set))

    def used(self, parameter: torch.Tensor) -> bool:
        return id(parameter) in self.uses

    def only_within(self, parameter: torch.Tensor, module: nn.Module) -> bool:
        """Whether all that uses the parameter happens while this module runs."""
        return all(id(module) in running for running in self.uses[id(parameter)])

    def running(self, parameter: torch.Tensor) -> set[int]:
        """All modules, by ``id``, that were running when it was used."""
        return set().union(*self.uses[id(parameter)])


@contextmanager
def recording(
    module: nn.Module,
    hosts: Sequence[tuple[nn.Parameter, torch.Tensor]],
    device: torch.device,
) -> Iterator[Record]:
    """Record the forward of ``module`` run inside. ``hosts`` are its parameters, each with its
    tensor in host memory."""
    record = Record()
    running: list[nn.Module] = []

    def begin(part: nn.Module, _: Any) -> None:
        record.calls.append(part)
        running.append(part)

    def end(*_: Any) -> None:
        running.pop()

    with ExitStack() as undo:
        for part in module.modules():
            if part is not module:  # it runs already
                undo.callback(part.register_forward_pre_hook(begin).remove)
                undo.callback(part.register_forward_hook(end, always_call=True).remove)
        running.append(module)
        weights = undo.enter_context(_stand_ins(hosts, device))
        undo.enter_context(torch.compiler.set_stance("force_eager"))
        fetch = _Fetch(weights, record, running, device)
        undo.enter_context(_Operations(fetch))
        undo.enter_context(_Functions(fetch))
        yield record


class _Fetch:
    """Gives an operation the real weights, on the device, and notes which it asked for.

    So it does for views of them: a module may return one, and another use it.
    """

    def __init__(
        self,
        weights: Mapping[int, tuple[nn.Parameter, torch.Tensor]],
        record: Record,
        running: list[nn.Module],
        device: torch.device,
    ) -> None:
        self._weights, self._record, self._running = weights, record, running
        self._device = device
        # By storage. Without a callback when one goes: an interrupt in it would be lost.
        self._fetched: dict[int, tuple[nn.Parameter, Any]] = {}

    def __call__(self, arguments: Any) -> Any:
        """As ``tree_map_only`` would, but quick for what operations are mostly given."""
        if isinstance(arguments, torch.Tensor):
            return self._real(arguments)
        kind = type(arguments)
        if kind is tuple or kind is list:
            return kind(map(self, arguments))
        if kind is dict:
            return {key: self(value) for key, value in arguments.items()}
        if arguments is None or isinstance(arguments, _LEAVES):
            return arguments
        return tree_map_only(torch.Tensor, self._real, arguments)

    def _real(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage in self._weights:
            parameter, host = self._weights[storage]
            self._note(parameter)
            return self._copy(parameter, host)
        parameter, alive = self._fetched.get(storage, _NEVER)
        if alive() is not None:  # else another storage has its address by now
            self._note(parameter)
        return tensor

    def _note(self, parameter: nn.Parameter) -> None:
        self._record.uses[id(parameter)].add(frozenset(map(id, self._running)))

    def _copy(self, parameter: nn.Parameter, host: torch.Tensor) -> torch.Tensor:
        """A copy of its own also on the CPU, and like the parameter in all that torch goes by."""
        copied = host.to(self._device, copy=True).requires_grad_(parameter.requires_grad)
        storage = copied.untyped_storage()
        self._fetched[storage._cdata] = parameter, weakref.ref(storage)
        return copied


class _Functions(TorchFunctionMode):
    """Sees a call before torch chooses how to compute it by what the tensors are like."""

    def __init__(self, fetch: _Fetch) -> None:
        self._fetch = fetch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asks = getattr(func, "__name__", "") in _ATTRIBUTES  # a shape, a dtype: no weight needed
        args, kwargs = (args, kwargs or {}) if asks else self._fetch((args, kwargs or {}))
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Sees what never was a call of Python's."""

    def __init__(self, fetch: _Fetch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fetch = fetch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self._fetch((args, kwargs or {}))
        return func(*args, **kwargs)


@contextmanager
def _stand_ins(
    hosts: Sequence[tuple[nn.Parameter, torch.Tensor]], device: torch.device
) -> Iterator[dict[int, tuple[nn.Parameter, torch.Tensor]]]:
    """Put a stand-in in the place of each parameter's tensor, and know it by its storage."""
    weights, alive = {}, []
    with ExitStack() as undo:
        for parameter, host in hosts:
            one = stand_in(host, device)
            alive.append(one)  # also where something else takes its place: storages are reused
            undo.callback(setattr, parameter, "data", parameter.data)
            parameter.data = one
            weights[one.untyped_storage()._cdata] = parameter, host
        yield weights


def stand_in(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the same shape and dtype on another device, of one element: NaN, so that no one
    uses it unnoticed."""
    with torch.inference_mode(False):
        nothing = float("nan") if host.is_floating_point() else 0
        one = torch.full((1,), nothing, dtype=torch.float32, device=device).to(host.dtype)
        return one.expand(host.shape)
