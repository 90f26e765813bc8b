"""The ladder that diffusers' documentation published, for `bench_peers.py` to climb again.

Stable Diffusion 1.5, 512x512, one image, 50 DDIM steps. A rung has all that the one above it has,
and one thing more. Attention is plain up to the last rung: torch had no fused one then. The last
takes torch's memory-efficient kernel, which came from xFormers'.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from autofit import techniques
from autofit.spec import Plan, Slot, Technique
from autofit.techniques.attention import SdpaKernel
from autofit.techniques.execution import TracedDenoiser
from autofit.techniques.memory_format import ChannelsLastDenoiser
from autofit.techniques.placement import Resident
from autofit.techniques.precision import HalfPrecision

APPLIED = ExitStack()  # never closed: a child has one contender
FLOAT16, CHANNELS_LAST, TRACED = HalfPrecision("float16"), ChannelsLastDenoiser(), TracedDenoiser()


@dataclass(frozen=True)
class Rung:
    """``published_s``: seconds an image on a TITAN RTX, by diffusers' page on speed of 2023."""

    title: str
    published_s: float
    techniques: tuple[Technique, ...] = ()


# By contender, from the bottom.
LADDER = {
    "ladder-original": Rung("original", 9.50),
    "ladder-float16": Rung("float16", 3.61, (FLOAT16,)),
    "ladder-channels-last": Rung("channels last", 3.30, (FLOAT16, CHANNELS_LAST)),
    "ladder-traced": Rung("traced UNet", 3.21, (FLOAT16, CHANNELS_LAST, TRACED)),
    "ladder-efficient-attention": Rung(
        "memory-efficient attention",
        2.63,
        (FLOAT16, CHANNELS_LAST, TRACED, SdpaKernel("efficient")),
    ),
}


def climb(pipe: Any, rung: Rung, device: str) -> dict[str, Any]:
    """Leave a pipe as the rung has it, for good."""
    plan = Plan((*rung.techniques, Resident()))
    plain = plan.at(Slot.ATTENTION) is None
    if plain:
        without_fused_attention(pipe)
    APPLIED.enter_context(techniques.applied(plan, pipe, device))
    return {"plan": plan.label + (", plain attention" if plain else "")}


def without_fused_attention(pipe: Any) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    for module in (pipe.unet, pipe.vae):
        module.set_attn_processor(AttnProcessor())
