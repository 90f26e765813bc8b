"""Ctrl-C: what it ends with, and a time when it does no harm."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED = 130  # exit code


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C within waits for the end of the block: what is half written would be lost.

    Only for what takes milliseconds. Python tells the main thread of a Ctrl-C, so that elsewhere
    there is nothing to hold back.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    heard: list[Any] = []
    signal.signal(signal.SIGINT, lambda *received: heard.append(received))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if heard:
            before(*heard[-1])
