"""Take diffusers' and accelerate's offload hooks off a pipe without a trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from autofit import anatomy
from autofit.lazy import nn

_MODULE_ATTRIBUTES = ("forward", "_hf_hook", "_old_forward", "_diffusers_hook")
_PIPE_ATTRIBUTES = ("_all_hooks", "_offload_device", "_offload_gpu_id")
_GROUP_HOOKS = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")


@contextmanager
def attributes_held(targets: Iterable[Any], names: tuple[str, ...]) -> Iterator[None]:
    """Put these attributes of the objects' own ``__dict__`` back on exit, or take them away."""
    found = [(t, {n: t.__dict__[n] for n in names if n in t.__dict__}) for t in targets]
    try:
        yield
    finally:
        for target, before in found:
            for name in names:
                target.__dict__.pop(name, None)
            target.__dict__.update(before)


@contextmanager
def hook_attributes_held(pipe: Any) -> Iterator[None]:
    """Put back on exit what offload hooks set on the pipe and on every module in it."""
    with ExitStack() as undo:
        undo.enter_context(attributes_held([pipe], _PIPE_ATTRIBUTES))
        for module in anatomy.modules(pipe).values():
            undo.enter_context(attributes_held(list(module.modules()), _MODULE_ATTRIBUTES))
        yield


@contextmanager
def hosted_after_model_offload(pipe: Any) -> Iterator[None]:
    """Remove model offload's hooks on exit and bring the weights back to the CPU, in the same
    tensor objects as before (moving a module makes new ones of its buffers)."""
    found = [t for module in anatomy.modules(pipe).values() for t in anatomy.tensors(module)]
    try:
        yield
    finally:
        pipe.remove_all_hooks()
        for module in anatomy.modules(pipe).values():
            module.to("cpu")
        for owner, name, tensor in found:
            table: dict[str, Any] = (
                owner._parameters if name in owner._parameters else owner._buffers
            )
            tensor.data = table[name].data
            table[name] = tensor


def remove_group_hooks(module: nn.Module) -> None:
    """Remove the hooks of diffusers' group offload from a component and all below it."""
    from diffusers.hooks.hooks import HookRegistry

    registry = HookRegistry.check_if_exists_or_initialize(module)
    for name in _GROUP_HOOKS:
        registry.remove_hook(name, recurse=True)
    registry.invalidate_child_registries_cache()
