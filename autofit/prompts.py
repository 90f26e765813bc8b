"""Prompt embeddings kept from call to call: a prompt that comes again is not encoded again."""

from __future__ import annotations

import functools
import inspect
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from autofit import anatomy
from autofit.spec import Role

ENTRIES = 64
MAX_BYTES = 256 * 2**20  # of host memory. A prompt of FLUX is 4 MiB, one of SDXL 0.6 MiB
SAMPLES = 64  # of each weight, compared to see that it is what it was
_ATOMS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
_OPAQUE = object()
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_OF_EVERY_MODULE = vars(nn.Module()).keys() - {"training"}
# One thread encodes at a time, of all pipes, which may share a tokenizer: how to pad and truncate
# is set on it before each call, so that threads could tokenize by each other's word.
_ENCODING = threading.RLock()


@contextmanager
def cached(pipe: Any, *, weights_move: bool = False) -> Iterator[None]:
    """Inside, ``encode_prompt`` of the pipe gives what it gave before for the same arguments, for
    as long as all that it goes by is the same: the text encoders, the tokenizers, the pipe's own
    settings. A pipe without ``encode_prompt`` is left alone.

    ``weights_move``: the weights that are there now have other values in their places from one
    moment to the next, and nobody changes them.
    """
    found = getattr(pipe, "encode_prompt", None)
    if found is None:
        yield
        return
    encoders = filter(_has_weights, _first(pipe.components).values())
    held = [t for m in encoders for _, _, t in anatomy.tensors(m)] if weights_move else []
    prompts = _Prompts(pipe, found, held)

    @functools.wraps(found)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        return prompts.encoded(args, kwargs)

    with anatomy.attribute(pipe, "encode_prompt", encode_prompt):
        yield


class _Prompts:
    """What was encoded, the latest last, all by the same text encoders."""

    def __init__(self, pipe: Any, found: Callable[..., Any], unread: list[torch.Tensor]) -> None:
        self._pipe, self._found = pipe, found
        self._unread = {id(tensor): tensor for tensor in unread}  # held: an id is not given twice
        self._kept: OrderedDict[Hashable, _Encoded] = OrderedDict()
        self._state: Any = None

    def encoded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with _ENCODING:
            return self._known_or_made(args, kwargs)

    def _known_or_made(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = self._key(args, kwargs)
        if key is None:
            return self._found(*args, **kwargs)
        state = _state(self._pipe, self._unread)
        entry = self._look_up(key, state)
        if entry is not None:
            return entry.given(self._pipe)
        before, drawn = dict(vars(self._pipe)), _drawn()
        made = self._found(*args, **kwargs)
        if drawn == _drawn():  # else another call would give something else
            self._keep(key, state, _Encoded.of(made, _changes(before, vars(self._pipe))))
        return made

    def _key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable | None:
        """All arguments, however they were given; None where one of them is not plain, or where
        more is asked for than values."""
        if torch.is_grad_enabled() or any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            return None
        try:
            bound = inspect.signature(self._found).bind(*args, **kwargs)
        except TypeError:  # the pipe's to tell
            return None
        bound.apply_defaults()
        given = _plain(bound.arguments)
        if given is _OPAQUE:
            return None
        # what some pipes ask themselves for
        guided = _plain(getattr(self._pipe, "do_classifier_free_guidance", None))
        device = bound.arguments.get("device") or getattr(self._pipe, "_execution_device", None)
        return given, guided, device

    def _look_up(self, key: Hashable, state: Any) -> _Encoded | None:
        if state != self._state:
            self._kept.clear()
            self._state = state
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def _keep(self, key: Hashable, state: Any, entry: _Encoded | None) -> None:
        if entry is None or state != self._state:  # changed by what it asked of itself
            return
        self._kept[key] = entry
        while len(self._kept) > ENTRIES or self._size_bytes() > MAX_BYTES:
            self._kept.popitem(last=False)

    def _size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self._kept.values())


@dataclass(frozen=True)
class _Encoded:
    """What a call gave, its tensors in host memory; and what else it set on the pipe."""

    leaves: tuple[Any, ...]
    devices: tuple[torch.device | None, ...]  # of those that are tensors
    spec: pytree.TreeSpec
    attributes: Mapping[str, Any]

    @classmethod
    def of(cls, made: Any, attributes: Mapping[str, Any]) -> _Encoded | None:
        """None where something of it cannot be kept or given again as it was."""
        leaves, spec = pytree.tree_flatten(made)
        if _plain(attributes) is _OPAQUE or not all(map(_is_keepable, leaves)):
            return None
        kept = tuple(_copied(leaf, torch.device("cpu")) for leaf in leaves)
        if any(_layout(a) != _layout(b) for a, b in zip(leaves, kept, strict=True)):
            return None
        devices = tuple(x.device if isinstance(x, torch.Tensor) else None for x in leaves)
        return cls(kept, devices, spec, attributes)

    def given(self, pipe: Any) -> Any:
        vars(pipe).update(self.attributes)
        leaves = map(_copied, self.leaves, self.devices)
        return pytree.tree_unflatten(list(leaves), self.spec)

    @functools.cached_property
    def size_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.leaves if isinstance(leaf, torch.Tensor))


def _is_keepable(leaf: Any) -> bool:
    return type(leaf) is torch.Tensor or _plain(leaf) is not _OPAQUE


def _copied(leaf: Any, device: torch.device | None) -> Any:
    """A copy of its own: a caller may write to what it is given."""
    return leaf.to(device, copy=True) if isinstance(leaf, torch.Tensor) else leaf


def _layout(leaf: Any) -> tuple[int, ...]:
    """Kernels differ by it, and with them the last bits."""
    return leaf.stride() if isinstance(leaf, torch.Tensor) else ()


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in after.items() if n not in before or before[n] is not v}


def _drawn() -> list[bytes]:
    """How far torch's own generators are: whoever draws from them moves them."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return [state.numpy().tobytes() for state in states]


# ---------------------------------------------------------------- what an encoding goes by


class _Same:
    """An object that is equal to itself only."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.held is self.held

    __hash__ = None  # type: ignore[assignment]


def _first(components: Mapping[str, Any]) -> dict[str, Any]:
    """All but what runs later: the denoiser with its scheduler, and the VAE."""
    later = (Role.DENOISER, Role.VAE)
    return {
        name: component
        for name, component in components.items()
        if anatomy.role(name) not in later and "scheduler" not in name
    }


def _has_weights(component: Any) -> bool:
    return isinstance(component, nn.Module)


def _state(pipe: Any, unread: Mapping[int, torch.Tensor]) -> Any:
    """What an encoding goes by besides its arguments, to be compared with that of another call."""
    components = pipe.components
    first = _first(components)
    encoders = list(filter(_has_weights, first.values()))
    weights = [row for module in encoders for row in anatomy.tensors(module)]
    return (
        [(n, None if _has_weights(c) else _described(c)) for n, c in first.items()],
        _settings({n: v for n, v in vars(pipe).items() if not n.startswith("_")}),
        _settings(pipe.config),
        # embeddings are cast to it
        [getattr(c, "dtype", None) for n, c in components.items() if n not in first],
        list(map(_structure, encoders)),
        [(name, tensor.shape, tensor.dtype) for _, name, tensor in weights],
        _samples(list(_readable(weights, unread))),
    )


def _described(component: Any) -> Any:
    """What holds no weights. A tokenizer by its words too: they may grow."""
    plain = _plain(component)
    if plain is not _OPAQUE:
        return plain
    words = len(component) if hasattr(type(component), "__len__") else None
    own = {n: v for n, v in getattr(component, "__dict__", {}).items() if type(v) in _ATOMS}
    return _Same(component), words, own


def _structure(module: nn.Module) -> Any:
    """Its parts with their settings: adapters are parts, and what is active, merged or scaled of
    them are settings."""
    return (
        _settings(vars(module.config)) if hasattr(module, "config") else None,
        [(n, type(m), _settings(vars(m), _OF_EVERY_MODULE)) for n, m in module.named_modules()],
    )


def _readable(
    weights: Iterable[tuple[nn.Module, str, torch.Tensor]], unread: Mapping[int, torch.Tensor]
) -> Iterator[tuple[torch.Tensor, int]]:
    """The weights whose values can be looked at, each with the step from sample to sample: one of
    every row of an embedding, whose rows are set one by one."""
    for owner, _, tensor in weights:
        data = tensor.data
        is_plain = type(data) is torch.Tensor and data.layout is torch.strided
        if id(tensor) in unread or data.is_meta or data.is_quantized or not is_plain:
            continue
        step = data.shape[-1] if isinstance(owner, nn.Embedding) else data.numel() // SAMPLES
        yield data, max(1, step)


def _samples(weights: Sequence[tuple[torch.Tensor, int]]) -> list[bytes]:
    """Some values of each weight, wherever it is now, as bits. What is written through ``data``,
    as where a LoRA is fused, leaves no other trace."""
    places: dict[tuple[torch.device, int], list[int]] = defaultdict(list)
    for number, (weight, _) in enumerate(weights):
        if weight.itemsize in _WORDS:
            places[weight.device, weight.itemsize].append(number)
    found = [b""] * len(weights)
    for (_, itemsize), numbers in places.items():  # together: each copy from a device is a wait
        picked = [weights[n][0].reshape(-1)[:: weights[n][1]] for n in numbers]
        words = torch.cat([p.view(_WORDS[itemsize]) for p in picked]).cpu()
        for number, part in zip(numbers, words.split(list(map(len, picked))), strict=True):
            found[number] = part.numpy().tobytes()
    return found


# ---------------------------------------------------------------- values


def _settings(found: Mapping[str, Any], without: Set[str] = frozenset()) -> dict[str, Hashable]:
    """Those that are plain."""
    plain = {name: _plain(value) for name, value in found.items() if name not in without}
    return {name: value for name, value in plain.items() if value is not _OPAQUE}


def _plain(value: Any) -> Hashable:
    """The value with its type, hashable; ``_OPAQUE`` where it is more than names and numbers."""
    kind = type(value)
    if kind in _ATOMS:
        return kind, value
    if kind in (list, tuple):
        parts = [*map(_plain, value)]
    elif kind is dict:
        parts = [_plain(part) for item in value.items() for part in item]
    else:
        return _OPAQUE
    return _OPAQUE if any(part is _OPAQUE for part in parts) else (kind, *parts)
