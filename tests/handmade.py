"""Facts with round figures, for results that can be checked in the head."""

from __future__ import annotations

from autofit.spec import BlockList, Component, Pipeline, Placement, Role, Workload
from autofit.techniques import CANDIDATES
from autofit.techniques.group_offload import GroupOffload

WORKLOAD = Workload(64, 64, 2, passes=2)
FACTS = Pipeline(
    cls="AnyPipeline",
    components=(
        Component("text_encoder", "Clip", Role.ENCODER, "float32", 100, 40),
        Component("text_encoder_2", "T5", Role.ENCODER, "float32", 300, 80),
        Component(
            "unet",
            "UNet",
            Role.DENOISER,
            "float32",
            1000,
            60,
            blocks=(BlockList("down", 4, 150, 600), BlockList("up", 2, 100, 200)),
            convolutional=True,
            group_norms=True,
        ),
        Component("vae", "Vae", Role.VAE, "float32", 50, 20, convolutional=True, group_norms=True),
    ),
    fingerprint="0",
    default_width=64,
    default_height=64,
    size_multiple_px=8,
    token_px=8,
    hidden_size=32,
    head_sizes=(16,),
    default_steps=2,
    default_passes=2,
    batched_guidance=True,
    offload_sequence=("text_encoder", "text_encoder_2", "unet", "vae"),
    repeated_blocks=("Block",),
)
BLOCK = GroupOffload("block")
BLOCK_STREAM = GroupOffload("block", stream=True)
LEAF = GroupOffload("leaf")
LEAF_STREAM = GroupOffload("leaf", stream=True)
KEEP = GroupOffload("leaf", stream=True, record_stream=True, keep="denoiser")
PLACEMENTS = [t for t in CANDIDATES if isinstance(t, Placement)]
