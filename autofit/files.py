"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Write a file for good: a reader sees the old one or the new one, never a part.

    Raises:
        OSError: the folder is missing or cannot be written to; what was there is there still.
    """
    partial = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with suppress(OSError):  # there when the writing failed
            partial.unlink()
