"""Pipelines from a folder or the Hub, in the checkpoint's own dtype."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from autofit.architectures import first_line
from autofit.spec import BadInput

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SAFETENSORS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def torch_dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise BadInput(f"dtype {name!r}: weights can be {', '.join(_DTYPES)}")
    return _DTYPES[name]


def from_folder(folder: Path, dtype: str | None) -> Any:
    """Load a pipeline from a local folder; without ``dtype`` each component in its files' own.

    Raises:
        BadInput: no ``model_index.json``, or files that are missing or broken.
    """
    if not (folder / "model_index.json").is_file():
        raise BadInput(
            f"model {str(folder)!r} is not a folder with a model_index.json; save_pretrained()"
            " makes one"
        )
    wanted = None if dtype is None else torch_dtype(dtype)
    try:
        return DiffusionPipeline.from_pretrained(
            folder, dtype=wanted or _own_dtypes(folder), local_files_only=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise BadInput(f"folder {folder}: {first_line(error)}; save the pipeline again") from error


def downloaded(model: str) -> Path:
    """The folder of ``org/name`` in the Hub's local cache, filled where it is not yet."""
    return Path(DiffusionPipeline.download(model))


def _own_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """The dtype that most weights of each component have; diffusers would make them float32."""
    found = {sub.name: _dtype_of(sub) for sub in folder.iterdir() if sub.is_dir()}
    return {"default": torch.float32, **{name: dtype for name, dtype in found.items() if dtype}}


def _dtype_of(folder: Path) -> torch.dtype | None:
    elements: Counter[str] = Counter()
    for file in folder.glob("*.safetensors"):
        if len(file.name.split(".")) > 2:  # a variant: model.fp16.safetensors
            continue
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a mapping
                tensor = weights.get_slice(name)
                elements[tensor.get_dtype()] += prod(tensor.get_shape())
    return _SAFETENSORS.get(elements.most_common(1)[0][0]) if elements else None
