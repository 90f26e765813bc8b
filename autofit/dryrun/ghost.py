"""Pipelines without weights: from a built-in's code, or from the small JSON files of a folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autofit import anatomy
from autofit.architectures.checkpoint import torch_dtype
from autofit.architectures.fake import made_fake
from autofit.spec import BadInput, Role
from autofit.techniques.precision import castable

# Not run: they judge the finished image, or serve inputs that a text prompt does not use.
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


@dataclass(frozen=True)
class Ghost:
    """A pipe to run on fake tensors of ``mode``; ``dtype`` is what its weights are cast to."""

    pipe: Any
    dtype: str | None = None
    mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))


def builtin(name: str, dtype: str) -> Ghost:
    """Build a built-in architecture without weights."""
    torch_dtype(dtype)  # refuses what weights cannot have
    ghost = Ghost(None, dtype)
    pipe = made_fake(name, ghost.mode)
    for module in anatomy.modules(pipe).values():
        module.eval()
    return Ghost(pipe, dtype, ghost.mode)


def from_folder(folder: Path, dtype: str | None) -> Ghost:
    """Build a saved pipeline from its JSON files alone: tokenizers are stood in for.

    Without ``dtype`` the weights have the one that most text encoders' configurations name.

    Raises:
        BadInput: no ``model_index.json``, or classes and files that are not there.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise BadInput(
            f"model {str(folder)!r} has no model_index.json; save_pretrained() makes one"
        )
    entries = json.loads(index.read_text("utf-8"))
    ghost = Ghost(None, dtype)
    if dtype is not None:
        torch_dtype(dtype)
    try:
        pipe = _pipeline(folder, entries, ghost.mode)
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"folder {folder}: {type(error).__name__}: {error}") from error
    return Ghost(pipe, dtype or _named_dtype(pipe), ghost.mode)


def _pipeline(folder: Path, entries: dict[str, Any], mode: FakeTensorMode) -> Any:
    parts: dict[str, Any] = {}
    for name, entry in entries.items():
        if name in _UNUSED:
            parts[name] = None
        elif isinstance(entry, list):
            parts[name] = _component(folder / name, entry, mode)
        elif not name.startswith("_"):
            parts[name] = entry
    return getattr(diffusers, entries["_class_name"])(**parts)


def _component(folder: Path, entry: list[str | None], mode: FakeTensorMode) -> Any:
    library, cls_name = entry
    if cls_name is None:
        return None
    if "Tokenizer" in cls_name:
        return _Tokenizer(folder)
    if library == "diffusers":
        cls = getattr(diffusers, cls_name)
        config = cls.load_config(folder)
        if "Scheduler" in cls_name:
            return cls.from_config(config)
        with mode:
            return cls.from_config(config).eval()
    cls = getattr(transformers, cls_name)
    config = cls.config_class.from_json_file(folder / "config.json")
    with mode:
        return cls(config).eval()


def _named_dtype(pipe: Any) -> str:
    named: Counter[str] = Counter()
    for module in anatomy.modules(pipe).values():
        config: Any = module.config
        if (dtype := getattr(config, "dtype", None)) is not None:
            named[str(dtype).removeprefix("torch.")] += 1
    return named.most_common(1)[0][0] if named else "float32"


class _Tokenizer:
    """Tokens of no meaning, as many as the true tokenizer pads to."""

    SHORT = 8  # of a prompt that nothing pads

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        self.model_max_length = int(config.get("model_max_length", 77))

    def __call__(
        self, text: str | list[str], padding: str | bool = False, max_length: int | None = None,
        **_: Any,
    ) -> Any:  # fmt: skip
        count = 1 if isinstance(text, str) else len(text)
        length = max_length or self.model_max_length
        if padding != "max_length":
            length = min(self.SHORT, length)
        ids, mask = (torch.tensor([[value] * length] * count) for value in (0, 1))
        return SimpleNamespace(input_ids=ids, attention_mask=mask)

    def tokenize(self, text: str) -> list[str]:
        """Pipelines look here for tokens of textual inversions: none are loaded."""
        return []


@contextmanager
def hollow(ghost: Ghost, roles: Collection[Role] = tuple(Role)) -> Iterator[None]:
    """Fake tensors of the ghost's dtype in place of all weights of these roles, and no other
    component that has weights; on exit all is back."""
    pipe = ghost.pipe
    with ExitStack() as stack:
        for name in anatomy.modules(pipe):
            if name in _UNUSED or anatomy.role(name) not in roles:
                stack.enter_context(_taken_out(pipe, name))
        for module in anatomy.modules(pipe).values():
            stack.enter_context(_places_held(module))
            stack.enter_context(anatomy.attribute(module, "to", _caster(module)))
            with ghost.mode:
                replace_tensors(module, _dtype_in(module, ghost.dtype))
        yield


@contextmanager
def _taken_out(pipe: Any, name: str) -> Iterator[None]:
    """The pipe without this component. Set as an attribute, None would be in its configuration for
    good: diffusers notes what it is given."""
    found, pipe.__dict__[name] = pipe.__dict__[name], None
    try:
        yield
    finally:
        pipe.__dict__[name] = found


@contextmanager
def _places_held(module: nn.Module) -> Iterator[None]:
    """On exit the same tensors are in the same places; nobody has them meanwhile."""
    found = list(anatomy.tensors(module))
    try:
        yield
    finally:
        for owner, name, tensor in found:
            _table(owner, name)[name] = tensor


def _dtype_in(module: nn.Module, dtype: str | None) -> Callable[[torch.Tensor], torch.dtype]:
    """What each weight comes to when the module is cast: made so, it need not be cast."""
    if dtype not in ("float16", "bfloat16"):
        return lambda t: t.dtype
    half = torch_dtype(dtype)
    cast = {id(tensor) for tensor in castable(module, half)}
    return lambda t: half if id(t) in cast else t.dtype


def _caster(module: nn.Module) -> Any:
    """``module.to`` for fake weights, which torch cannot swap. Pipelines cast their VAE so."""

    def to(*args: Any, dtype: torch.dtype | None = None, **_: Any) -> nn.Module:
        target = next((a for a in args if isinstance(a, torch.dtype)), dtype)
        if target is not None:
            replace_tensors(module, lambda t: target if t.is_floating_point() else t.dtype)
        return module

    return to


def replace_tensors(module: nn.Module, dtype_of: Any) -> None:
    """New tensors of the same shapes, tied ones tied. Under a fake mode they take no memory."""
    made: dict[int, torch.Tensor] = {}
    for owner, name, old in list(anatomy.tensors(module)):
        if id(old) not in made:
            new = torch.empty(old.shape, dtype=dtype_of(old), device="cpu")
            is_parameter = name in owner._parameters
            made[id(old)] = nn.Parameter(new, requires_grad=False) if is_parameter else new
        _table(owner, name)[name] = made[id(old)]


def _table(owner: nn.Module, name: str) -> dict[str, Any]:
    """Where a module keeps this tensor."""
    table: dict[str, Any] = owner._parameters if name in owner._parameters else owner._buffers
    return table
