"""Components that several architectures share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers import AutoencoderKL
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)


@dataclass(frozen=True)
class TextSize:
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int


def clip_text(size: TextSize, *, act: str = "quick_gelu", projection: int | None = None) -> Any:
    """Make a CLIP text encoder; with ``projection`` the class that projects the pooled state."""
    config = CLIPTextConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        hidden_act=act,
        projection_dim=projection or size.hidden,
        # As published: it makes the model pool at the highest id, which is the end of text.
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def t5_encoder(size: TextSize) -> Any:
    """Make the encoder half of a T5 v1.1."""
    return T5EncoderModel(
        T5Config(
            vocab_size=size.vocab,
            d_model=size.hidden,
            d_kv=size.hidden // size.heads,
            d_ff=size.intermediate,
            num_layers=size.layers,
            num_heads=size.heads,
            feed_forward_proj="gated-gelu",
        )
    )


def autoencoder(channels: tuple[int, ...], **settings: Any) -> Any:
    """Make an image VAE with one level for each channel count, so four of them scale by 8."""
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        **settings,
    )
