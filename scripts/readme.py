"""README's tables, each between two marks, made by a script."""

from __future__ import annotations

import sys
from pathlib import Path


def publish(readme: Path, begin: str, rows: str, end: str, *, check: bool) -> None:
    """Put rows between their marks. With ``check`` write nothing, and exit: 0 if they are there."""
    text = readme.read_text("utf-8")
    before, rest = text.split(begin, 1)
    _, after = rest.split(end, 1)
    made = before + begin + rows + end + after
    if check:
        script = Path(sys.argv[0]).name
        sys.exit(0 if made == text else f"README's table is out of date: run scripts/{script}")
    readme.write_text(made, "utf-8")
