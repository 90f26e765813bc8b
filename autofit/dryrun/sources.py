"""Where a model's shape comes from: a name, a folder, the Hub, or a pipe that is there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autofit import architectures
from autofit.spec import BadInput

if TYPE_CHECKING:
    from autofit.dryrun.ghost import Ghost

# Of a repository on the Hub, what a dry run reads: some kilobytes.
JSON_FILES = ("model_index.json", "*/config.json", "*/*_config.json")


@dataclass(frozen=True)
class Source:
    """``key`` tells models apart by what they compute; ``ghost`` builds it to be run."""

    key: str
    ghost: Callable[[], Ghost]


def source(model: Any, dtype: str | None) -> Source:
    """Find a model without building it. Loads nothing heavy for a name or a folder.

    Raises:
        BadInput: no such model, or a dtype for a pipe, which has its own.
    """
    if not isinstance(model, str):
        return _living(model, dtype)
    if model in architectures.names():
        return _builtin(model, dtype)
    return _folder(architectures.located(model) or _downloaded(model), dtype)


def _living(pipe: Any, dtype: str | None) -> Source:
    from autofit import probe
    from autofit.dryrun.ghost import Ghost

    if dtype is not None:
        raise BadInput(f"dtype {dtype!r}: a pipe has its own; apply half_precision to it")
    return Source(probe.fingerprint(pipe), lambda: Ghost(pipe))


def _builtin(name: str, dtype: str | None) -> Source:
    own = next(a.dtype for a in architectures.ARCHITECTURES if a.name == name)

    def build() -> Ghost:
        from autofit.dryrun import ghost

        return ghost.builtin(name, dtype or own)

    return Source(f"{name} {dtype or own}", build)


def _folder(folder: Path, dtype: str | None) -> Source:
    def build() -> Ghost:
        from autofit.dryrun import ghost

        return ghost.from_folder(folder, dtype)

    digest = hashlib.sha256()
    for pattern in JSON_FILES:
        for path in sorted(folder.glob(pattern)):
            digest.update(f"{path.relative_to(folder)} ".encode() + path.read_bytes())
    return Source(f"{digest.hexdigest()} {dtype}", build)


def _downloaded(model: str) -> Path:
    from huggingface_hub import snapshot_download

    with architectures.reaching_hub(model):
        return Path(snapshot_download(model, allow_patterns=list(JSON_FILES)))
