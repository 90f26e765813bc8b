"""Published configurations, as on the Hub. Called where weights get no memory (``meta``, fakes)."""

from __future__ import annotations

from typing import Any

import diffusers

from autofit.architectures.parts import TextSize, autoencoder, clip_text, t5_encoder
from autofit.architectures.tokenizers import clip_tokenizer, t5_tokenizer

_CLIP_L = TextSize(vocab=49408, hidden=768, intermediate=3072, layers=12, heads=12)
_CLIP_G = TextSize(vocab=49408, hidden=1280, intermediate=5120, layers=32, heads=20)
_T5_XXL = TextSize(vocab=32128, hidden=4096, intermediate=10240, layers=24, heads=64)
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _vae(**settings: Any) -> Any:
    return autoencoder((128, 256, 512, 512), layers_per_block=2, **settings)


def _vae_16_channels(scaling_factor: float, shift_factor: float) -> Any:
    return _vae(
        sample_size=1024,
        latent_channels=16,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def sd15() -> Any:
    """runwayml/stable-diffusion-v1-5 without its safety checker, with DDIM for its PNDM."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8
    )
    vae = _vae(sample_size=512, scaling_factor=0.18215)
    text_encoder = clip_text(_CLIP_L)
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


def sdxl() -> Any:
    """stabilityai/stable-diffusion-xl-base-1.0."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),  # heads, not their size
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    vae = _vae(sample_size=1024, scaling_factor=0.13025, force_upcast=True)
    text_encoder = clip_text(_CLIP_L)
    text_encoder_2 = clip_text(_CLIP_G, act="gelu", projection=1280)
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


def sd35_medium() -> Any:
    """stabilityai/stable-diffusion-3.5-medium."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        caption_projection_dim=1536,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )
    vae = _vae_16_channels(1.5305, 0.0609)
    text_encoder = clip_text(_CLIP_L, projection=768)
    text_encoder_2 = clip_text(_CLIP_G, act="gelu", projection=1280)
    text_encoder_3 = t5_encoder(_T5_XXL)
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


def flux_dev() -> Any:
    """black-forest-labs/FLUX.1-dev."""
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        guidance_embeds=True,
        axes_dims_rope=(16, 56, 56),
    )
    vae = _vae_16_channels(0.3611, 0.1159)
    text_encoder = clip_text(_CLIP_L)
    text_encoder_2 = t5_encoder(_T5_XXL)
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer(),
        text_encoder_2=text_encoder_2,
        tokenizer_2=t5_tokenizer(512),
        transformer=transformer,
    )


def pixart_sigma() -> Any:
    """PixArt-alpha/PixArt-Sigma-XL-2-1024-MS."""
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=28,
        num_attention_heads=16,
        attention_head_dim=72,
        cross_attention_dim=1152,
        caption_channels=4096,
        interpolation_scale=2,
        use_additional_conditions=False,  # 1024 pixels would turn them on, as PixArt-α has them
    )
    vae = _vae(sample_size=1024, scaling_factor=0.13025, force_upcast=True)
    text_encoder = t5_encoder(_T5_XXL)
    return diffusers.PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(300),
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


PIPELINES = {
    "sd15": sd15,
    "sdxl": sdxl,
    "sd35-medium": sd35_medium,
    "flux-dev": flux_dev,
    "pixart-sigma": pixart_sigma,
}
