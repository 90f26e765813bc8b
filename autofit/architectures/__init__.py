"""Built-in architectures: pipelines of the published shapes with random weights, made offline."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autofit import host
from autofit.spec import BadInput
from autofit.units import format_bytes


@dataclass(frozen=True)
class Architecture:
    """A built-in model. ``dtype`` is that of the published weights as people load them."""

    name: str
    cls: str  # diffusers pipeline class
    summary: str
    dtype: str
    width: int
    height: int
    steps: int
    parameters: int  # of all components, buffers not counted


_SD, _SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
_SD3, _FLUX, _PIX = "StableDiffusion3Pipeline", "FluxPipeline", "PixArtSigmaPipeline"
_F32, _F16, _BF16 = "float32", "float16", "bfloat16"

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("tiny-sd", _SD, "UNet, CLIP: for tests", _F32, 64, 64, 4, 1_475_291),
    Architecture("tiny-sdxl", _SDXL, "UNet, two CLIPs: for tests", _F32, 64, 64, 4, 3_892_763),
    Architecture("tiny-flux", _FLUX, "DiT, CLIP, T5: for tests", _F32, 64, 64, 4, 554_635),
    Architecture("tiny-sd3", _SD3, "DiT, two CLIPs, T5: for tests", _F32, 64, 64, 4, 545_291),
    Architecture("sd15", _SD, "Stable Diffusion 1.5", _F32, 512, 512, 50, 1_066_235_307),
    Architecture("sdxl", _SDXL, "Stable Diffusion XL base", _F16, 1024, 1024, 30, 3_468_837_867),
    Architecture(
        "sd35-medium", _SD3, "Stable Diffusion 3.5 medium", _BF16, 1024, 1024, 40, 7_907_612_003
    ),
    Architecture("flux-dev", _FLUX, "FLUX.1-dev", _BF16, 1024, 1024, 28, 16_870_599_139),
    Architecture("pixart-sigma", _PIX, "PixArt-Sigma XL", _F16, 1024, 1024, 20, 5_456_820_615),
)


def names() -> tuple[str, ...]:
    return tuple(a.name for a in ARCHITECTURES)


def build(name: str, *, dtype: str | None = None, seed: int = 0) -> Any:
    """Build a built-in pipeline on the CPU with random weights, ready to run.

    Without ``dtype`` the weights have the architecture's own. The same seed gives the same weights.

    Raises:
        BadInput: no such architecture, a dtype that weights cannot have, or more of them than this
            host's memory holds.
    """
    from accelerate import init_empty_weights

    from autofit.architectures.weights import materialize

    architecture, to = _asked(name, dtype)
    _check_room(architecture, to.itemsize)
    with init_empty_weights():
        pipe = made(architecture.name)
    materialize(pipe, to, seed)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def outline(name: str, *, dtype: str | None = None) -> Any:
    """Build a built-in pipeline for its facts, in a second: its weights are meta tensors.

    Raises:
        BadInput: no such architecture, or a dtype that weights cannot have.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from autofit.architectures.fake import made_fake
    from autofit.architectures.weights import cast

    architecture, to = _asked(name, dtype)
    pipe = made_fake(architecture.name, FakeTensorMode())
    cast(pipe, to)
    return pipe


def _asked(name: str, dtype: str | None) -> tuple[Architecture, Any]:
    """A built-in architecture, and the dtype that its weights are to have."""
    from autofit.architectures.checkpoint import torch_dtype

    architecture = next((a for a in ARCHITECTURES if a.name == name), None)
    if architecture is None:
        raise _unknown(name)
    return architecture, torch_dtype(dtype or architecture.dtype)


def _check_room(architecture: Architecture, element_bytes: int) -> None:
    """Said at once, where making the weights would take minutes until the system ends it."""
    weight_bytes, host_bytes = architecture.parameters * element_bytes, host.machine_bytes()
    if weight_bytes > host_bytes:
        weights, has = format_bytes(weight_bytes), format_bytes(host_bytes)
        halved = "load them in half precision by --dtype, or " if element_bytes > 2 else ""
        raise BadInput(
            f"model {architecture.name!r}: its weights are {weights}, and this host has {has} of"
            f" memory: {halved}predict, by --gpu"
        )


def made(name: str) -> Any:
    """Make a built-in pipeline as diffusers does. Its weights get memory where the caller lets
    them: not under ``init_empty_weights``, nor in a fake mode. Both at once fail in torch 2.11."""
    from autofit.architectures import published, tiny

    return (tiny.PIPELINES | published.PIPELINES)[name]()


def located(model: str) -> Path | None:
    """The folder that a model's text names; None for ``org/name``, on the Hub.

    Raises:
        BadInput: neither.
    """
    folder = Path(os.path.expanduser(model))  # pathlib raises for an unknown ~user
    if folder.exists():
        return folder
    if _HUB_ID.fullmatch(model):
        return None
    raise _unknown(model)


@contextmanager
def reaching_hub(model: str) -> Iterator[None]:
    """For whatever asks the Hub for a model: its failures become one line.

    Raises:
        BadInput: no such model, no access to it, or no network.
    """
    import httpx

    try:
        yield
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise BadInput(
            f"model {model!r}: could not reach the Hub, or it has no such pipeline"
            f" ({first_line(error.__cause__ or error)}); give a local folder, or a built-in:"
            f" {', '.join(names())}"
        ) from error


def load(model: str, *, dtype: str | None = None) -> Any:
    """Load a built-in, else a local folder, else ``org/name`` from the Hub, on the CPU.

    Without ``dtype`` every component has the dtype of its own weights.

    Raises:
        BadInput: no such model, a folder without a pipeline, or no way to reach the Hub.
    """
    if model in names():
        return build(model, dtype=dtype)
    folder = located(model)
    from autofit.architectures.checkpoint import downloaded, from_folder

    if folder is None:
        with reaching_hub(model):
            folder = downloaded(model)
    pipe = from_folder(folder, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def first_line(error: BaseException) -> str:
    """What an error says, without a full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _unknown(model: str) -> BadInput:
    if "/" in model or model.startswith(("~", ".")):
        return BadInput(f"model {model!r}: no such folder; give one, or a Hub id as org/name")
    near = difflib.get_close_matches(model, names(), n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Built in: {', '.join(names())}."
    return BadInput(f"model {model!r} is not built in. {hint} Else give a folder, or org/name")
