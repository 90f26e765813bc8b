"""A diffusers pipe -> Pipeline facts, without running it."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from diffusers.models.attention import FeedForward
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from autofit import anatomy, host
from autofit.spec import BlockList, Component, Pipeline

# Pixels a latent side, where a pipeline does not say: all of Stable Diffusion and Flux.
VAE_SCALE = 8
# What of a configuration says how it was made, not what it is; all that starts with "_" does too.
_ORIGIN = ("transformers_version", "architectures", "dtype", "torch_dtype")


def facts(pipe: Any) -> Pipeline:
    """Read a pipe's facts.

    Raises:
        BadInput: the pipe has no denoiser that we know.
    """
    denoiser, vae = anatomy.denoiser(pipe), anatomy.vae(pipe)
    is_unet = hasattr(denoiser.config, "block_out_channels")
    scale = int(getattr(pipe, "vae_scale_factor", VAE_SCALE))
    token_px = scale if is_unet else scale * _patch(denoiser, vae)
    width, height = _default_size(pipe, denoiser, scale)
    call = inspect.signature(type(pipe).__call__).parameters
    batched = batches_guidance(pipe)
    ranges = host.mapped_ranges()
    return Pipeline(
        cls=type(pipe).__name__,
        components=tuple(_component(n, m, ranges) for n, m in anatomy.modules(pipe).items()),
        fingerprint=fingerprint(pipe),
        default_width=width,
        default_height=height,
        size_multiple_px=token_px,
        token_px=token_px,
        hidden_size=_hidden_size(denoiser),
        head_sizes=_head_sizes(denoiser),
        default_steps=int(call["num_inference_steps"].default),
        default_passes=2 if batched and float(call["guidance_scale"].default) > 1 else 1,
        batched_guidance=batched,
        offload_sequence=tuple(filter(None, (pipe.model_cpu_offload_seq or "").split("->"))),
        repeated_blocks=tuple(getattr(denoiser, "_repeated_blocks", None) or ()),
        sliceable_attention=hasattr(denoiser, "set_attention_slice"),
        feed_forward_bound=_feed_forward_bound(denoiser),
        vae_slices=hasattr(vae, "use_slicing"),
        vae_tiles=_tiling_family(vae),
        vae_upcasts=anatomy.upcasts(pipe),
        vae_channels=_vae_channels(vae),
        adapters=_adapters(pipe),
        takes_frames="num_frames" in call,
    )


def batches_guidance(pipe: Any) -> bool:
    """Whether both guidance passes run as one batch. Pipelines do not say; their source does."""
    return anatomy.call_says(pipe, "[latents] * 2")


def fingerprint(pipe: Any) -> str:
    """Hash what decides memory and speed: classes, configurations, names, shapes and dtypes.

    Not the values of the weights: two fine-tunes of one model share their profiles. Adapters add
    parameters, so a pipe with a LoRA loaded has another fingerprint.
    """
    digest = hashlib.sha256(type(pipe).__name__.encode())
    for name, module in anatomy.modules(pipe).items():
        config: Any = module.config
        config = config if isinstance(config, dict) else config.to_dict()
        known = {k: v for k, v in config.items() if k[0] != "_" and k not in _ORIGIN}
        digest.update(f"{name} {type(module).__name__} ".encode())
        digest.update(json.dumps(known, sort_keys=True, default=str).encode())
        for key, tensor in module.state_dict().items():
            digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
    return digest.hexdigest()


def _adapters(pipe: Any) -> tuple[str, ...]:
    """The names that PEFT keeps on each module that has adapters."""
    configs = (getattr(module, "peft_config", {}) for module in anatomy.modules(pipe).values())
    return tuple(sorted({str(name) for config in configs for name in config}))


def _component(name: str, module: nn.Module, ranges: Sequence[tuple[int, int]]) -> Component:
    lists = _block_sizes(module)
    in_order = [size_bytes for sizes in lists.values() for size_bytes in sizes]
    return Component(
        name=name,
        cls=type(module).__name__,
        role=anatomy.role(name),
        dtype=dtype_of(module),
        weight_bytes=_bytes(module.modules()),
        largest_leaf_bytes=max(_bytes([m]) for m in module.modules()),
        blocks=tuple(BlockList(p, len(s), max(s), sum(s)) for p, s in lists.items()),
        neighbours_bytes=max(map(sum, pairwise(in_order)), default=sum(in_order)),
        groups=getattr(module, "_supports_group_offloading", True),
        convolutional=any(
            isinstance(m, nn.Conv2d) and m.kernel_size != m.stride for m in module.modules()
        ),
        group_norms=any(isinstance(m, nn.GroupNorm) for m in module.modules()),
        leaves=sum(_bytes([m]) > 0 for m in module.modules()),
        mapped_bytes=_mapped_bytes(module, ranges),
        kept_bytes=_kept_bytes(module),
    )


def _kept_bytes(module: nn.Module) -> int:
    kept = anatomy.kept_in_float32(module, torch.float16)
    weights = module.state_dict(keep_vars=True)
    return sum(weights[name].nbytes for name in kept if weights[name].dtype is torch.float32)


def _mapped_bytes(module: nn.Module, ranges: Sequence[tuple[int, int]]) -> int:
    """Of the weights, what lies in files."""
    found = {_address(t): t for _, _, t in anatomy.tensors(module) if t.device.type == "cpu"}
    starts = [start for start, _ in ranges]
    return sum(
        tensor.nbytes
        for at, tensor in found.items()
        if (n := bisect_right(starts, at)) and at + tensor.nbytes <= ranges[n - 1][1]
    )


def _bytes(owners: Iterable[nn.Module]) -> int:
    """Bytes of the distinct tensors that these modules own themselves: tied weights count once."""
    found = {
        _address(t): t.numel() * t.element_size()
        for owner in owners
        for table in (owner._parameters, owner._buffers)
        for t in table.values()
        if t is not None
    }
    return sum(found.values())


def _address(tensor: torch.Tensor) -> int:
    """What tells its memory from other memory; tensors without any are told apart by themselves."""
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        return id(tensor)
    return tensor.data_ptr() or id(tensor)


def dtype_of(module: nn.Module) -> str:
    """That of most of its weights."""
    sizes: Counter[str] = Counter()
    for _, _, tensor in anatomy.tensors(module):
        if tensor.is_floating_point():
            sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return sizes.most_common(1)[0][0] if sizes else "float32"


def _block_sizes(module: nn.Module) -> dict[str, list[int]]:
    """Bytes of the blocks in the ModuleLists that diffusers' block-level offload walks: direct
    children of the module."""
    return {
        path: [_bytes(block.modules()) for block in child]
        for path, child in module.named_children()
        if isinstance(child, nn.ModuleList | nn.Sequential) and len(child)
    }


def _patch(denoiser: nn.Module, vae: Any | None) -> int:
    """Latent pixels on a side of one token: the patch, times the packing of Flux-like pipelines
    (which put 2x2 latent pixels into the channels: four times as many as the VAE's)."""
    config: Any = denoiser.config
    latent = (
        (vae.config.get("latent_channels") or config.in_channels) if vae else config.in_channels
    )
    packing = int(math.sqrt(max(1, config.in_channels // latent)))
    patch = getattr(config, "patch_size", None) or 1
    side = patch[-1] if isinstance(patch, tuple | list) else patch  # of video: (frames, rows, ...)
    return int(side) * packing


def _hidden_size(denoiser: nn.Module) -> int:
    config: Any = denoiser.config
    if hasattr(config, "block_out_channels"):
        return int(config.block_out_channels[0])
    return int(config.num_attention_heads * config.attention_head_dim)


def _head_sizes(denoiser: nn.Module) -> tuple[int, ...]:
    attentions = [m for m in denoiser.modules() if hasattr(m, "heads") and hasattr(m, "inner_dim")]
    return tuple(sorted({int(m.inner_dim) // int(m.heads) for m in attentions}))  # type: ignore[arg-type]


def _feed_forward_bound(denoiser: nn.Module) -> bool:
    """Whether diffusers' feed-forward layers hold the most, by where they stand: in a UNet at full
    resolution (SDXL's are below it), in a transformer in every block (the single ones of Flux-like
    models have others). Dry runs of the built-in models say the same."""
    lists = [m for m in denoiser.children() if isinstance(m, nn.ModuleList) and len(m)]
    unet: Any = getattr(denoiser, "down_blocks", None)
    blocks = unet[:1] if unet is not None else [block for blocks in lists for block in blocks]
    return len(blocks) > 0 and all(
        any(isinstance(m, FeedForward) for m in block.modules()) for block in blocks
    )


def _default_size(pipe: Any, denoiser: nn.Module, scale: int) -> tuple[int, int]:
    config: Any = denoiser.config
    sample = (
        getattr(pipe, "default_sample_size", None) or getattr(config, "sample_size", None) or 64
    )
    height, width = sample if isinstance(sample, tuple | list) else (sample, sample)
    return int(width) * scale, int(height) * scale


def _vae_channels(vae: Any | None) -> int:
    """Channels at full resolution: AutoencoderKL's first, the base of the video families'."""
    config: Any = vae.config if vae is not None else {}
    channels = config.get("block_out_channels") or config.get("base_dim") or 128
    return int(channels[0] if isinstance(channels, tuple | list) else channels)


def _tiling_family(vae: Any | None) -> Literal["attributes", "arguments"] | None:
    if hasattr(vae, "tile_latent_min_size") and hasattr(vae, "tile_overlap_factor"):
        return "attributes"
    enable = getattr(vae, "enable_tiling", None)
    if enable is not None and "tile_sample_stride_height" in inspect.signature(enable).parameters:
        return "arguments"
    return None
