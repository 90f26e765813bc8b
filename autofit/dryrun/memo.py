"""What dry runs found, kept in this process and on disk. Loads nothing heavy."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import platformdirs
from pydantic import TypeAdapter

from autofit.files import write_whole
from autofit.roofline import PhaseFacts
from autofit.spec import Pipeline

# The facts follow from the code of these, whatever the model.
PACKAGES = ("torch", "diffusers", "transformers")
_OWN = Path(__file__).parent.parent
_OWN_CODE = (
    "dryrun/*.py", "architectures/*.py", "techniques/*.py", "roofline.py", "spec.py", "anatomy.py",
    "tiling.py", "probe/pipeline.py", "trial/generation.py",
)  # fmt: skip


@dataclass(frozen=True)
class Latents:
    """What the VAE is given, and what is live meanwhile beside the weights and these."""

    shape: tuple[int, ...]
    dtype: str
    held_bytes: int


@dataclass(frozen=True)
class Front:
    """All before decoding: encoding, one step, and the latents."""

    encode: PhaseFacts
    step: PhaseFacts
    latents: Latents


Found = TypeVar("Found", Front, PhaseFacts, Pipeline)
_READERS: dict[type, TypeAdapter[Any]] = {k: TypeAdapter(k) for k in (Front, PhaseFacts, Pipeline)}
_MEMORY: dict[str, Any] = {}


def digest(*parts: Any) -> str:
    """Hash what facts depend on, the versions of libraries and our own code included."""
    versions = [(package, metadata.version(package)) for package in PACKAGES]
    return hashlib.sha256(repr((parts, versions, _code())).encode()).hexdigest()[:24]


def remembered(key: str, kind: type[Found], make: Callable[[], Found]) -> Found:
    """Look up in memory, then on disk; else make it and keep it in both."""
    if key not in _MEMORY:
        found = _read(key, kind)
        if found is None:
            found = make()
            _write(key, found)
        _MEMORY[key] = found
    known: Found = _MEMORY[key]
    return known


def forget() -> None:
    """Empty this process's memory; the files stay."""
    _MEMORY.clear()


def folder() -> Path:
    home = os.environ.get("AUTOFIT_HOME")
    base = Path(home) / "cache" if home else Path(platformdirs.user_cache_dir("autofit"))
    return base / "dryrun"


def _read(key: str, kind: type[Found]) -> Found | None:
    try:
        found: Found = _READERS[kind].validate_json((folder() / f"{key}.json").read_bytes())
        return found
    except (OSError, ValueError):
        return None  # never made, or cut short: made anew


def _write(key: str, found: Front | PhaseFacts | Pipeline) -> None:
    path = folder() / f"{key}.json"
    with suppress(OSError):  # a folder that cannot be written costs some seconds the next time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(dataclasses.asdict(found)).encode())


@cache
def _code() -> str:
    """A hash of our own code, read once a process."""
    digest = hashlib.sha256()
    for pattern in _OWN_CODE:
        for path in sorted(_OWN.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()
