"""Which part of a pipe is which, and how to change one thing of it and put it back."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from typing import Any

from autofit.lazy import nn, torch
from autofit.spec import BadInput, Role

DENOISERS = ("transformer", "unet")
VAES = ("vae", "vqvae", "movq")
_ABSENT = object()


def modules(pipe: Any) -> dict[str, nn.Module]:
    """The pipe's components that hold weights, by name, in the pipe's own order."""
    return {n: c for n, c in pipe.components.items() if isinstance(c, nn.Module)}


def role(name: str) -> Role:
    if name in DENOISERS:
        return Role.DENOISER
    if name in VAES:
        return Role.VAE
    return Role.ENCODER if "encoder" in name else Role.OTHER


def denoiser(pipe: Any) -> nn.Module:
    """The component that runs every step.

    Raises:
        BadInput: the pipe has none that we know.
    """
    for name in DENOISERS:
        if isinstance(getattr(pipe, name, None), nn.Module):
            module: nn.Module = getattr(pipe, name)
            return module
    raise BadInput(
        f"{type(pipe).__name__} has no component named {' or '.join(DENOISERS)}:"
        " autofit plans pipelines with one denoiser"
    )


def vae(pipe: Any) -> Any | None:
    return next((m for n, m in modules(pipe).items() if role(n) is Role.VAE), None)


def entries(name: str, module: nn.Module) -> Iterator[nn.Module]:
    """The modules of a component that are entered from outside."""
    if role(name) is not Role.VAE:
        yield module
        return
    yield from (m for n, m in module.named_children() if n in ("encoder", "decoder"))


def upcasts(pipe: Any) -> bool:
    """Whether a float16 VAE is decoded in float32: its configuration asks, but few pipelines read
    that (``force_upcast`` is True unless said otherwise)."""
    found = vae(pipe)
    asks = found is not None and bool(found.config.get("force_upcast", False))
    return asks and call_says(pipe, "force_upcast")


def kept_in_float32(module: nn.Module, dtype: torch.dtype) -> set[str]:
    """Weights that ``from_pretrained`` leaves in float32: those that diffusers lists for both half
    precisions, those of transformers' plain list (which alone has a strict one) for float16."""
    listed: Any = getattr(module, "_keep_in_fp32_modules", None) or ()
    strict: Any = getattr(module, "_keep_in_fp32_modules_strict", None)
    if strict is not None and dtype != torch.float16:
        listed = ()
    parts = {*listed, *(strict or ())}
    names = module.state_dict(keep_vars=True)
    return {n for n in names if any(f".{part}." in f".{n}." for part in parts)}


def call_says(pipe: Any, text: str) -> bool:
    """Whether the source of the pipeline's call has this text: what it does, it says nowhere."""
    return text in inspect.getsource(type(pipe).__call__)


def is_called() -> bool:
    """Whether a pipeline's call is under way in this thread."""
    from diffusers import DiffusionPipeline

    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        is_call = frame.f_code.co_name == "__call__"
        if is_call and isinstance(frame.f_locals.get("self"), DiffusionPipeline):
            return True
    return False


def tensors(module: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """Every parameter and buffer with its owner and its name there; shared ones once an owner."""
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    yield owner, name, tensor


def users_hooks(module: nn.Module) -> list[Any]:
    """The forward hooks on a module that are not autofit's."""
    tables = (module._forward_pre_hooks, module._forward_hooks)
    hooks = [hook for table in tables for hook in table.values()]
    return [h for h in hooks if not str(getattr(h, "__module__", "")).startswith("autofit.")]


@contextmanager
def attribute(target: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of one object; on exit the object's own ``__dict__`` is as it was."""
    before = target.__dict__.get(name, _ABSENT)
    setattr(target, name, value)
    try:
        yield
    finally:
        if before is _ABSENT:
            target.__dict__.pop(name, None)
        else:
            target.__dict__[name] = before


@contextmanager
def methods(target: Any, own: dict[str, Any]) -> Iterator[None]:
    """Give one object methods that Python looks for on its class, as ``__call__``: it has a class
    of its own meanwhile, of the same name, and equal to its own: diffusers compares classes."""
    found: Any = type(target)
    named = {name: getattr(found, name) for name in ("__module__", "__qualname__", "__doc__")}
    alike = {"__eq__": lambda own, other: own is other or found == other,
             "__hash__": lambda _: hash(found)}  # fmt: skip
    kind = type(type(found).__name__, (type(found),), alike)
    target.__class__ = kind(found.__name__, (found,), named | own)
    try:
        yield
    finally:
        target.__class__ = found


@contextmanager
def saved_as(real: Mapping[tuple[nn.Module, str], torch.Tensor]) -> Iterator[None]:
    """A ``state_dict`` inside, also of a single layer, has these tensors, by owner and name there:
    those in their places may be another's, or empty."""

    def saved(owner: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for table in (owner._parameters, owner._buffers):
            for name, tensor in table.items():
                key = prefix + name
                if (owner, name) in real and key in state and state[key] is not tensor:
                    state[key] = real[owner, name]

    with ExitStack() as undo:
        for owner in {owner for owner, _ in real}:
            undo.callback(owner.register_state_dict_post_hook(saved).remove)
        yield


@contextmanager
def weights_held(module: nn.Module, without: Set[int] = frozenset()) -> Iterator[None]:
    """Whatever happens to the weights inside, the same tensors are back in their places on exit.

    Holds the tensors found, so what moves or casts inside costs a copy; nothing is copied back.
    ``without`` are those to leave alone, by ``id``.
    """
    found = [
        (owner, name, tensor, tensor.data)
        for owner, name, tensor in tensors(module)
        if id(tensor) not in without
    ]
    try:
        yield
    finally:
        for owner, name, tensor, data in found:
            table: dict[str, Any] = (
                owner._parameters if name in owner._parameters else owner._buffers
            )
            table[name] = tensor
            tensor.data = data
