"""torch, loaded when something of it is first used: what only plans and predicts does without.

    from autofit.lazy import nn, torch

Not for code that ``torch.compile`` looks into.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
    from torch import nn as nn
    from torch.utils import _pytree as pytree
else:

    class _Lazy:
        def __init__(self, name: str) -> None:
            self._name = name
            self._module: ModuleType | None = None

        def __getattr__(self, name: str) -> Any:
            if self._module is None:
                self._module = importlib.import_module(self._name)
            return getattr(self._module, name)

    torch, nn, pytree = map(_Lazy, ("torch", "torch.nn", "torch.utils._pytree"))

__all__ = ["nn", "pytree", "torch"]
