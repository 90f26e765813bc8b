"""How near a plan's tiles come to an untiled decode: of a part that fits, decoded both ways."""

from __future__ import annotations

import copy
import logging
from contextlib import nullcontext
from typing import Any

import torch

from autofit import anatomy
from autofit.spec import Plan, Slot
from autofit.techniques.decode import TiledVae
from autofit.trial.meter import HostTracker

_log = logging.getLogger(__name__)


def seam_psnr_db(
    pipe: Any, plan: Plan, latents: torch.Tensor | None, device: torch.device, cap_bytes: int | None
) -> float | None:
    """PSNR in dB over the seams of the first image, where four of its tiles meet, or two where
    memory is too short to decode the part of four whole. None where nothing is cut, where diffusers
    does the cutting (videos), or where memory is too short for two.

    ``latents`` as the pipe decoded them. The plan is undone by now: this decodes with a copy of the
    VAE, alone on the device and in the dtype of the latents.
    """
    tiles, vae = plan.at(Slot.DECODE), anatomy.vae(pipe)
    if not isinstance(tiles, TiledVae) or vae is None or latents is None:
        return None
    for rows in (2, 1):
        alone = HostTracker(cap_bytes) if device.type == "cpu" else nullcontext()
        try:
            with alone:
                there = copy.deepcopy(vae).to(device)
                if there.dtype != latents.dtype:  # SDXL's, which the pipe casts to decode
                    there.to(latents.dtype)
                seams = tiles.seams(there, latents.to(device), rows)
            return seams.seam_psnr_db if seams else None
        except Exception as error:  # no plan is worse for a figure that could not be had
            _log.info("seams not compared, of %d rows of tiles: %s", rows, error)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return None
