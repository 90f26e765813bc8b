"""What of a plan a module is run without, and why: logged, and kept for who asks."""

from __future__ import annotations

import logging
import re
from typing import Any

from autofit.lazy import torch

_log = logging.getLogger(__name__)
_FOLDERS = re.compile(r"/[^\s'\"]*/")  # of a path


class Fallbacks:
    """In order, each told once.

    Whoever stands for a forward has these as its ``fallbacks``: ``functools.wraps`` hands them on
    to what wraps it.
    """

    def __init__(self, module: Any, instead: str) -> None:
        """``instead`` says how the module runs where it falls back: "eagerly, not traced"."""
        self._head = f"{type(module).__name__} runs {instead}: "
        self._texts: dict[str, None] = {}

    def tell(self, reason: str) -> None:
        text = self._head + reason
        if text not in self._texts:
            self._texts[text] = None
            _log.warning("%s", text)

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(self._texts)


def asks_for(device_type: str) -> str | None:
    """What a call asks for that recorded code does not do: why it runs eagerly."""
    if torch.is_grad_enabled():
        return "its call records gradients, as outside torch.no_grad()"
    return "its call is under autocast" if torch.is_autocast_enabled(device_type) else None


def texts_of(module: Any) -> tuple[str, ...]:
    """What was told of a module, for a profile: those travel, and name no folder."""
    found: Fallbacks | None = getattr(module.forward, "fallbacks", None)
    return () if found is None else tuple(_FOLDERS.sub("", text) for text in found.texts)
