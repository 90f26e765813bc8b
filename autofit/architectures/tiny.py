"""Pipelines of the published classes, small enough for one CPU core."""

from __future__ import annotations

from typing import Any

import diffusers

from autofit.architectures.parts import TextSize, autoencoder, clip_text, t5_encoder
from autofit.architectures.tokenizers import clip_tokenizer, t5_tokenizer

_TEXT_32 = TextSize(vocab=1024, hidden=32, intermediate=64, layers=2, heads=2)
_TEXT_16 = TextSize(vocab=1024, hidden=16, intermediate=32, layers=2, heads=2)
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _vae(**settings: Any) -> Any:
    return autoencoder((16, 32, 32, 32), norm_num_groups=8, sample_size=64, **settings)


def tiny_sd() -> Any:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,  # heads, not their size
        norm_num_groups=8,
    )
    vae = _vae(scaling_factor=0.18215)
    text_encoder = clip_text(_TEXT_32)
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(
            clip_sample=False, set_alpha_to_one=False, steps_offset=1, **_BETAS
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_sdxl() -> Any:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 2),
        attention_head_dim=(2, 4, 4),  # heads, not their size
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        norm_num_groups=8,
    )
    vae = _vae(scaling_factor=0.13025, force_upcast=True)
    text_encoder = clip_text(_TEXT_32)
    text_encoder_2 = clip_text(_TEXT_32, act="gelu", projection=32)
    return diffusers.StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(pad="!"),
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(
            steps_offset=1, timestep_spacing="leading", **_BETAS
        ),
        add_watermarker=False,
    )


def tiny_flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    vae = _vae(
        scaling_factor=0.3611,
        shift_factor=0.1159,
        latent_channels=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    text_encoder = clip_text(_TEXT_32)
    text_encoder_2 = t5_encoder(_TEXT_32)
    pipe: Any = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer(),
        text_encoder_2=text_encoder_2,
        tokenizer_2=t5_tokenizer(512),
        transformer=transformer,
    )
    pipe.default_sample_size = 8  # the class has 1024 pixels for every model
    return pipe


def tiny_sd3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=64,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    vae = _vae(
        scaling_factor=1.5305,
        shift_factor=0.0609,
        latent_channels=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    text_encoder = clip_text(_TEXT_16, projection=16)
    text_encoder_2 = clip_text(_TEXT_16, act="gelu", projection=16)
    text_encoder_3 = t5_encoder(_TEXT_32)
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer(),
        text_encoder_2=text_encoder_2,
        tokenizer_2=clip_tokenizer(pad="!"),
        text_encoder_3=text_encoder_3,
        tokenizer_3=t5_tokenizer(512),
    )


PIPELINES = {
    "tiny-sd": tiny_sd,
    "tiny-sdxl": tiny_sdxl,
    "tiny-flux": tiny_flux,
    "tiny-sd3": tiny_sd3,
}
