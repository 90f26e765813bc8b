"""The call that makes a workload's images, the same for every plan."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_map, tree_map_only

from autofit import anatomy, probe
from autofit.spec import Workload

PROMPT = "a lighthouse on a rocky coast at dusk, waves, photograph"
SEED = 0


def generate(
    pipe: Any, workload: Workload, steps: int, *, prompt: str = PROMPT, seed: int = SEED
) -> Any:
    """Run the pipe for a workload. Returns its images, float, (batch, height, width, 3)."""
    seeded = [torch.Generator("cpu").manual_seed(seed + i) for i in range(workload.batch)]
    asked = asked_of(pipe, workload, steps, prompt)
    with _noise_of_any_dtype(pipe):
        out = pipe(**asked, generator=seeded, output_type="np")
    return out.images if hasattr(out, "images") else out.frames


def asked_of(pipe: Any, workload: Workload, steps: int, prompt: str = PROMPT) -> dict[str, Any]:
    """The arguments with which a pipe is called for a workload; noise and output are left open."""
    asked = {
        "prompt": [prompt] * workload.batch,
        "width": workload.width,
        "height": workload.height,
        "num_inference_steps": steps,
    }
    known = inspect.signature(type(pipe).__call__).parameters
    if workload.frames > 1 and "num_frames" in known:
        asked["num_frames"] = workload.frames
    if workload.passes == 1 and probe.batches_guidance(pipe):
        asked["guidance_scale"] = 1.0
    return asked


@contextmanager
def _noise_of_any_dtype(pipe: Any) -> Iterator[None]:
    """Draw the initial latents in float32, whatever the pipe's dtype, and round them to it.

    torch draws other numbers from the same seed in other dtypes (seen with 2.11), so that the
    images of a half-precision plan could not be compared with the pipe's own.
    """
    found = pipe.prepare_latents

    def prepare_latents(*args: Any, **kwargs: Any) -> Any:
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]
        wide = tree_map(
            lambda a: torch.float32 if isinstance(a, torch.dtype) else a, (args, kwargs)
        )
        latents = found(*wide[0], **wide[1])
        if not given:
            return latents
        return tree_map_only(torch.Tensor, lambda t: t.to(given[0]), latents)

    with anatomy.attribute(pipe, "prepare_latents", prepare_latents):
        yield
