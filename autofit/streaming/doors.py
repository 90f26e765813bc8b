"""Layers inside of compiled blocks that can be entered one by one, as those of an eager block can.

A hook inside of compiled code is compiled with it, or breaks it. So compiled code calls such a
layer as an operator that the compiler knows nothing of, which calls the layer's door: that has the
hooks. All between the layers is fused as before, and a layer itself is a library's matrix product
in compiled code too.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import nn

from autofit import anatomy
from autofit.fallbacks import Fallbacks, asks_for

# Of a block's weights: what of it has no door stays on the device. Biases and norms are far less.
REST_SHARE = 1 / 16
_DOORS: dict[int, Door] = {}  # by the id of the weight; the operator is the process's


class Door(nn.Module):
    """Stands around a layer, and is called whenever the layer is, also by compiled code."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self._found = layer, layer.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._found(x)


# The order is never written. That it is said to be keeps the layers in the order of the program:
# the compiler is free to exchange any that do not need each other's results, and units come in the
# order that was recorded. Nor is the weight read: it says which layer this is, since a constant
# would be compiled in, and each block would be compiled for itself.
@torch.library.custom_op(
    "autofit::layer",
    mutates_args=("order",),
    schema="(Tensor x, Tensor weight, Tensor(a!) order) -> Tensor",
)
def _layer(x: torch.Tensor, weight: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, _DOORS[id(weight)](x)).contiguous()


@_layer.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def entrance(module: nn.Module) -> nn.Module:
    """Where hooks of a module belong: at its door, if it has one."""
    return _door(module) or module


def layers(block: nn.Module) -> list[nn.Module]:
    """The layers with doors in a compiled block; none where it can be entered as a whole only."""
    return [m for m in block.modules() if _door(m)] if is_compiled(block) else []


def is_compiled(block: nn.Module) -> bool:
    return hasattr(block.__dict__.get("forward"), "_torchdynamo_orig_callable")


@contextmanager
def opened(
    module: nn.Module, moving: Set[int], unit_bytes: int, device: torch.device
) -> Iterator[None]:
    """Give the layers doors, in the compiled blocks of a module that are larger than a unit.

    Before a block is first run: code that was compiled without them has none. ``moving`` are the
    weights that stream, by ``id``.
    """
    found = _openings(module, moving, unit_bytes)
    with ExitStack() as undo:
        if found:
            forward = _eager_at_times(module, device)
            undo.enter_context(anatomy.attribute(module, "forward", forward))
        for layers in found:
            undo.enter_context(_with_doors(layers, device))
        yield


def _openings(module: nn.Module, moving: Set[int], unit_bytes: int) -> list[list[nn.Linear]]:
    """The layers that get doors, block by block."""
    owners = Counter(id(tensor) for _, _, tensor in anatomy.tensors(module))
    found = []
    for block in filter(_may_open, module.modules()):
        linear = [m for m in block.modules() if isinstance(m, nn.Linear)]
        layers = [m for m in linear if _may_have_door(m, moving, owners)]
        block_bytes = _bytes([block], moving)
        rest_bytes = block_bytes - _bytes(layers, moving)
        if block_bytes > unit_bytes and rest_bytes <= REST_SHARE * block_bytes:
            found.append(layers)
    return found


def _eager_at_times(module: nn.Module, device: torch.device) -> Callable[..., Any]:
    """The operator knows of no gradients, and of no casts: what asks for them runs eagerly."""
    found = module.forward

    @functools.wraps(found)
    def forward(*args: Any, **kwargs: Any) -> Any:
        asked = asks_for(device.type)
        if asked is not None:
            told.tell(asked)
        with torch.compiler.set_stance("force_eager") if asked else nullcontext():
            return found(*args, **kwargs)

    told = getattr(found, "fallbacks", None) or Fallbacks(module, "eagerly, not compiled")
    forward.fallbacks = told  # type: ignore[attr-defined]
    return forward


def _may_open(block: nn.Module) -> bool:
    """Whether who compiled it says so (``opens``)."""
    return is_compiled(block) and getattr(block.__dict__["forward"], "opens", False)


def _may_have_door(layer: nn.Linear, moving: Set[int], owners: Counter[int]) -> bool:
    """Not what only looks like a plain layer, nor what shares a weight with another, nor what has
    hooks: these run outside of the door, and may use the weight."""
    plain = type(layer) is nn.Linear and "forward" not in layer.__dict__
    plain = plain and not (layer._forward_hooks or layer._forward_pre_hooks)
    alone = all(owners[id(parameter)] == 1 for parameter in layer.parameters())
    return plain and alone and id(layer.weight) in moving


def _bytes(modules: Sequence[nn.Module], moving: Set[int]) -> int:
    return sum(p.nbytes for m in modules for p in m.parameters() if id(p) in moving)


def _door(module: nn.Module) -> Door | None:
    return getattr(module.__dict__.get("forward"), "door", None)


@contextmanager
def _with_doors(layers: Sequence[nn.Linear], device: torch.device) -> Iterator[None]:
    with torch.inference_mode(False):
        order = torch.zeros(1, device=device)
    with ExitStack() as undo:
        for layer in layers:
            undo.callback(_DOORS.pop, id(layer.weight), None)
            forward = _entered(layer, layer.weight, order)
            undo.enter_context(anatomy.attribute(layer, "forward", forward))
        yield


def _entered(
    layer: nn.Linear, weight: torch.Tensor, order: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer's forward by its door, which is known by the weight from now on."""
    door = _DOORS[id(weight)] = Door(layer)

    def forward(x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return cast(torch.Tensor, _layer(x, weight, order))
        return cast(torch.Tensor, door(x))

    forward.door = door  # type: ignore[attr-defined]
    return forward
