"""A pipe that its owner goes on changing while a profile is applied.

What changes or reads weights by a method of the pipe or of a component runs with the plan off, and
the plan is applied anew afterwards: it finds the weights as they are without autofit, and
``revert()`` keeps what it did. What is changed without such a method is seen at the next call. What
would take the weights from where the plan has them is refused.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import nn

from autofit import anatomy
from autofit.spec import BadInput, Plan

_CHANGES = (
    *("load_", "unload_", "fuse_", "unfuse_", "set_", "enable_", "disable_", "add_adapter"),
    *("delete_", "save_", "resize_", "reset_attention_backend", "state_dict"),
)
_HARMLESS = ("set_progress_bar_config", "set_extra_state")
_PLACES = (
    *("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"),
    *("remove_all_hooks", "reset_device_map", "enable_layerwise_casting"),
    *("compile", "compile_repeated_blocks"),
)
_COPIES = ("__reduce_ex__",)  # and pickles
_OFFLOADS = ("enable_model_cpu_offload", "remove_all_hooks")  # what model offload calls itself
_REPLAYS = {"traced", "cuda_graph"}
_log = logging.getLogger(__name__)


class Keeper(Protocol):
    """Who keeps a plan applied to a pipe."""

    plan: Plan

    @property
    def is_applied(self) -> bool: ...

    def suspended(self) -> AbstractContextManager[None]:
        """The plan is off inside, and applied anew on exit."""


# ---------------------------------------------------------------- what is guarded


@contextmanager
def pipe_guarded(pipe: Any, keeper: Keeper) -> Iterator[None]:
    """Guard the pipe's own methods and its components."""
    found: Any = type(pipe)

    def set_attribute(self: Any, name: str, value: Any) -> None:
        if keeper.is_applied and hasattr(value, "_orig_mod"):
            raise _refused(f"torch.compile of {found.__name__}.{name}", keeper)
        before = vars(self).get(name)
        modules = isinstance(before, nn.Module) or isinstance(value, nn.Module)
        with keeper.suspended() if modules and value is not before else nullcontext():
            found.__setattr__(self, name, value)

    own: dict[str, Any] = {
        name: _guard(found, name, getattr(found, name), keeper) for name in _guarded_names(found)
    }
    with anatomy.methods(pipe, own | {"__setattr__": set_attribute}):
        yield


@contextmanager
def parts_guarded(
    pipe: Any, keeper: Keeper, device: torch.device, found: Mapping[nn.Module, set[torch.dtype]]
) -> Iterator[None]:
    """Guard the components' methods. ``found`` are the dtypes of each without the plan."""
    with ExitStack() as undo:
        for module in anatomy.modules(pipe).values():
            kind = type(module)
            guards = {
                name: functools.partial(_guard(kind, name, getattr(kind, name), keeper), module)
                for name in _guarded_names(kind)
            }
            guards["_apply"] = functools.partial(_moved, module, keeper, device, found[module])
            for name, guard in {**guards, "_autofit": keeper}.items():
                undo.enter_context(anatomy.attribute(module, name, guard))
        yield


def dtypes(pipe: Any) -> dict[nn.Module, set[torch.dtype]]:
    return {module: _dtypes(module) for module in anatomy.modules(pipe).values()}


def _guarded_names(kind: type) -> list[str]:
    """Class methods change nothing themselves: they ask a component to."""
    return [
        name
        for name in dir(kind)
        if name in (*_PLACES, *_COPIES)
        or (
            name.startswith(_CHANGES)
            and name not in _HARMLESS
            and isinstance(inspect.getattr_static(kind, name), FunctionType)
        )
    ]


def _guard(kind: type, name: str, found: Callable[..., Any], keeper: Keeper) -> Callable[..., Any]:
    @functools.wraps(found)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = name in _OFFLOADS and keeper.plan.placement.name == "model_offload"
        if not keeper.is_applied or own:
            return found(self, *args, **kwargs)
        if name in _COPIES:
            raise BadInput(
                f"{kind.__name__} has a profile applied, and cannot be copied: call revert() first"
            )
        if name in _PLACES:
            raise _refused(f"{kind.__name__}.{name}", keeper)
        with keeper.suspended():
            return found(self, *args, **kwargs)

    return guarded


def _refused(what: str, keeper: Keeper) -> BadInput:
    plan = keeper.plan.label
    return BadInput(
        f"{what}: a profile is applied, which says how it runs ({plan}): call revert() first"
    )


def _moved(
    module: nn.Module,
    keeper: Keeper,
    device: torch.device,
    found: set[torch.dtype],
    change: Callable[[torch.Tensor], torch.Tensor],
    recurse: bool = True,
) -> nn.Module:
    """What ``to``, ``half``, ``cpu`` and their like come to: refused if it does anything. The
    dtypes as found are let be, for a pipe made of these parts asks for them (``from_pipe``)."""
    offloads = keeper.plan.placement.name == "model_offload"
    kind: Any = type(module)
    if not keeper.is_applied or anatomy.is_called():  # some calls cast the VAE to decode
        kind._apply(module, change, recurse)
        return module
    for dtype in _dtypes(module):
        made = change(torch.empty(0, dtype=dtype, device=device))
        moves = made.device.type != device.type or made.device.index != _index(device)
        if made.dtype not in {dtype, getattr(module, "dtype", dtype), *found} or (
            moves and not offloads
        ):
            advice = "call revert() first"
            if made.dtype != dtype:
                advice += f", or pass from_pipe torch_dtype={dtype}"
            raise BadInput(
                f"{kind.__name__} has a profile applied, which keeps it in {dtype} on {device},"
                f" not in {made.dtype} on {made.device}: {advice}"
            )
        if made.dtype != dtype:
            text = "%s stays in %s, as its profile says: call revert() first"
            _log.warning(text, kind.__name__, dtype)
            return module
    if offloads:
        kind._apply(module, change, recurse)
    return module


def _index(device: torch.device) -> int | None:
    return torch.empty(0, device=device).device.index


def _dtypes(module: nn.Module) -> set[torch.dtype]:
    return {tensor.dtype for _, _, tensor in anatomy.tensors(module)}


# ---------------------------------------------------------------- what is seen


def state(pipe: Any) -> list[Any]:
    """The denoiser's parts with their attention processors, adapters and hooks, to be compared with
    those of another moment. Held, not named: an ``id`` may be given twice. Nothing replays the
    other components."""
    found: list[Any] = []
    for part in anatomy.denoiser(pipe).modules():
        own = vars(part)
        found += [part, own.get("processor"), *anatomy.users_hooks(part)]
        if "merged_adapters" in own:
            found += [list(own["merged_adapters"]), dict(own.get("scaling", {}))]
            found += [own.get("_disable_adapters"), own.get("_active_adapter")]
    return found


def heard(plan: Plan, pipe: Any) -> Plan:
    """The plan without what replays the denoiser's Python, where a hook of the user's is in it."""
    replays = [t for t in plan.techniques if t.traits & _REPLAYS]
    if not replays:
        return plan
    denoiser = anatomy.denoiser(pipe)
    for name, part in denoiser.named_modules():
        if part is not denoiser and anatomy.users_hooks(part):
            where = f"{type(denoiser).__name__}.{name}"
            text = "%s has a forward hook, which %s would not call: eager until the hook is removed"
            _log.warning(text, where, replays[0].label)
            return Plan(tuple(t for t in plan.techniques if t not in replays))
    return plan
