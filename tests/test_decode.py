from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Pipes
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    AutoencoderTiny,
)
from diffusers.models.autoencoders.vae import DecoderOutput
from samples import device
from torch import nn

from autofit.architectures import build
from autofit.plain import plain
from autofit.probe.pipeline import facts
from autofit.spec import BadInput, Effect, Phase, Pipeline, Technique, Workload
from autofit.techniques import KINDS
from autofit.techniques.decode import DECODES, SlicedVae, TiledVae
from autofit.trial import generate
from autofit.trial.meter import HostTracker


def kl(width: int = 8) -> Any:
    return AutoencoderKL(
        block_out_channels=(width,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        sample_size=256,
    )


def _video(cls: Any) -> Any:
    return cls(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def wan() -> Any:
    return _video(AutoencoderKLWan)


def qwen() -> Any:
    return _video(AutoencoderKLQwenImage)


@pytest.fixture(params=[kl, wan, qwen], ids=["kl", "wan", "qwen"])
def pipe(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    vae = request.param().eval()
    return SimpleNamespace(components={"vae": vae}, vae=vae)


def _images(pipe: Any, batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    """Latents or pixels, in the number of dimensions that the VAE wants."""
    frame = () if isinstance(pipe.vae, AutoencoderKL) else (1,)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, *frame, height, width, generator=generator)


def _decoded(pipe: Any, latents: torch.Tensor) -> tuple[torch.Tensor, list[torch.Size]]:
    """The images, and the shape of the decoder's input at each of its calls."""
    shapes: list[torch.Size] = []
    hook = pipe.vae.decoder.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    with torch.no_grad():
        images = pipe.vae.decode(latents).sample
    hook.remove()
    return images, shapes


@pytest.mark.parametrize(
    ("tile", "tiles"),
    [(TiledVae(64, 0.25), 4 * 3), (TiledVae(128, 0.25), 2 * 2), (TiledVae(128, 0.125), 2 * 2)],
    ids=lambda x: getattr(x, "label", None),
)
def test_tiles_are_used_and_the_image_keeps_its_shape(
    pipe: Any, tile: TiledVae, tiles: int
) -> None:
    latents = _images(pipe, 1, 4, 24, 18)
    whole, calls = _decoded(pipe, latents)
    assert len(calls) == 1
    with tile.applied(pipe, "cpu"):
        tiled, calls = _decoded(pipe, latents)
    assert len(calls) == tiles
    assert len(set(calls)) == 1
    assert max(calls[0][-2:]) == tile.tile_px // 8
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)


def test_one_tile_is_the_whole_image(pipe: Any) -> None:
    latents = _images(pipe, 1, 4, 8, 8)
    whole, _ = _decoded(pipe, latents)
    with TiledVae(64, 0.25).applied(pipe, "cpu"):
        assert torch.equal(_decoded(pipe, latents)[0], whole)


def test_encoding_is_tiled_alike(pipe: Any) -> None:
    pixels = _images(pipe, 1, 3, 192, 144)
    with torch.no_grad():
        whole = pipe.vae.encode(pixels).latent_dist.mean
        with TiledVae(64, 0.25).applied(pipe, "cpu"):
            tiled = pipe.vae.encode(pixels).latent_dist.mean
            small = pipe.vae.encode(pixels[..., :64, :64]).latent_dist.mean
        assert tiled.shape == whole.shape
        assert torch.equal(small, pipe.vae.encode(pixels[..., :64, :64]).latent_dist.mean)


def test_slices_of_a_batch_are_the_batch(pipe: Any) -> None:
    latents = _images(pipe, 3, 4, 8, 8)
    whole, _ = _decoded(pipe, latents)
    with SlicedVae().applied(pipe, "cpu"):
        sliced, calls = _decoded(pipe, latents)
    assert [shape[0] for shape in calls] == [1, 1, 1]
    torch.testing.assert_close(sliced, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "images", "slices"),
    [(4, 2, [2, 2]), (5, 2, [2, 2, 1]), (5, 4, [4, 1]), (4, 4, [4]), (3, 8, [3])],
)
def test_slices_of_several_images_are_the_batch(
    pipe: Any, batch: int, images: int, slices: list[int]
) -> None:
    latents = _images(pipe, batch, 4, 8, 8)
    whole, _ = _decoded(pipe, latents)
    pipe.vae.enable_slicing()  # by its owner: what is asked for here comes before
    with SlicedVae(images).applied(pipe, "cpu"):
        sliced, calls = _decoded(pipe, latents)
        assert pipe.vae.use_slicing is True
    assert [shape[0] for shape in calls] == slices
    torch.testing.assert_close(sliced, whole, rtol=1e-4, atol=1e-5)


def test_slices_return_what_decode_does(pipe: Any) -> None:
    latents, generator = _images(pipe, 3, 4, 8, 8), torch.Generator()
    options = {"generator": generator} if isinstance(pipe.vae, AutoencoderKL) else {}
    with torch.no_grad(), SlicedVae(2).applied(pipe, "cpu"):
        image = pipe.vae.decode(latents, **options).sample
        for out in (
            pipe.vae.decode(latents, return_dict=False, **options),
            pipe.vae.decode(latents, False),
            pipe.vae.decode(z=latents, return_dict=False),
        ):
            assert type(out) is tuple
            assert len(out) == 1
            assert torch.equal(out[0], image)
    assert type(pipe.vae.decode(latents)) is DecoderOutput


def test_what_belongs_to_an_image_is_cut_with_it_and_all_else_is_passed_on() -> None:
    asked: list[tuple[Any, ...]] = []

    def decode(z: torch.Tensor, step: torch.Tensor, *, mask: Any, generator: Any) -> Any:
        asked.append((step.tolist(), mask.shape, generator))
        return (z * 2,)

    vae = nn.Module()
    vae.use_slicing, vae.decode = False, decode
    z, one, mask = torch.randn(3, 4), torch.tensor([7]), torch.zeros(3, 2, 2)
    with SlicedVae(2).applied(SimpleNamespace(components={"vae": vae}), "cpu"):
        (image,) = vae.decode(z, one, mask=mask, generator="any")
    assert asked == [([7], (2, 2, 2), "any"), ([7], (1, 2, 2), "any")]
    assert torch.equal(image, z * 2)
    assert vae.decode is decode


def test_fewer_images_at_once_hold_less() -> None:
    pipe = SimpleNamespace(components={"vae": (vae := kl(32).eval())}, vae=vae)
    latents, peak_bytes = _images(pipe, 10, 4, 8, 8), []
    image_bytes = 10 * 3 * 64 * 64 * 4
    for technique in (SlicedVae(1), SlicedVae(2), SlicedVae(4), SlicedVae(8), SlicedVae(16)):
        with technique.applied(pipe, "cpu"), torch.no_grad(), HostTracker(None) as tracker:
            vae.decode(latents)
        peak_bytes.append(tracker.peak_bytes)
    one, two, four, eight, whole = peak_bytes
    assert one < two < four < eight < whole
    assert (two, four) == pytest.approx(
        tuple(image_bytes + whole * images / 10 for images in (2, 4)), rel=0.02
    )


def test_slices_of_a_vae_that_the_pipeline_casts(pipes: Pipes) -> None:
    """SDXL's, from float16 to float32 and back, around its call of decode."""
    found, asked = pipes["tiny-sdxl"], Workload(64, 64, 2, batch=3)
    with torch.no_grad(), KINDS["half_precision"]("float16").applied(found, "cpu"):
        whole = generate(found, asked, 2)
        with SlicedVae(2).applied(found, "cpu"):
            sliced, calls = _called(found, asked)
    assert calls == [(2, torch.float32), (1, torch.float32)]
    assert abs(sliced - whole).max() < 1e-3


def _called(pipe: Any, asked: Workload) -> tuple[Any, list[tuple[int, torch.dtype]]]:
    """The images, and what the decoder was called with."""
    calls: list[tuple[int, torch.dtype]] = []
    hook = pipe.vae.decoder.register_forward_pre_hook(
        lambda _, args: calls.append((args[0].shape[0], args[0].dtype))
    )
    images = generate(pipe, asked, 2)
    hook.remove()
    return images, calls


def test_slices_with_streamed_weights_are_those_with_resident_ones(pipes: Pipes) -> None:
    found, asked, slices = pipes["tiny-sd"], Workload(64, 64, 2, batch=3), SlicedVae(2)
    with torch.no_grad(), slices.applied(found, "cpu"):
        resident = generate(found, asked, 2)
        with KINDS["streamed"]().applied(found, "cpu"):
            for _ in range(3):  # recorded, timed, streamed
                streamed = generate(found, asked, 2)
    assert (resident == streamed).all()


def test_tiles_of_slices(pipe: Any) -> None:
    with TiledVae(64, 0.25, sliced=True).applied(pipe, "cpu"):
        _, calls = _decoded(pipe, _images(pipe, 2, 4, 12, 8))
    assert [shape[0] for shape in calls] == [1] * 4  # two tiles an image


def test_small_images_fill_no_more_than_a_tile_at_once() -> None:
    """Else a plan for one large image would lack the memory for a batch of small ones."""
    torch.manual_seed(0)
    pipe = SimpleNamespace(components={"vae": kl().eval()})
    pipe.vae = pipe.components["vae"]
    small, large = _images(pipe, 5, 4, 6, 5), _images(pipe, 2, 4, 12, 8)
    whole, _ = _decoded(pipe, small)
    with TiledVae(64, 0.25).applied(pipe, "cpu"):
        images, calls = _decoded(pipe, small)
        _, tiles = _decoded(pipe, large)
    assert [shape[0] for shape in calls] == [2, 2, 1]  # 8 x 8 positions hold two of 6 x 5
    assert torch.allclose(images, whole, atol=1e-5)
    assert [shape[0] for shape in tiles] == [2, 2]
    pipe.vae.use_slicing = True
    with TiledVae(64, 0.25).applied(pipe, "cpu"):
        _, calls = _decoded(pipe, small)
    assert [shape[0] for shape in calls] == [1] * 5


def test_tiles_of_a_half_precision_image_are_half_precision(pipe: Any) -> None:
    pipe.vae.to(torch.bfloat16)
    with TiledVae(64, 0.25).applied(pipe, "cpu"):
        images, _ = _decoded(pipe, _images(pipe, 1, 4, 12, 8).bfloat16())
    assert images.dtype == torch.bfloat16
    assert images.isfinite().all()


def test_a_video_is_tiled_as_diffusers_does() -> None:
    torch.manual_seed(0)
    vae = wan().eval()
    latents = torch.randn(1, 4, 2, 20, 12)
    vae.enable_tiling(64, 64, 48, 48)
    with torch.no_grad():
        expected = vae.decode(latents).sample
        vae.disable_tiling()
        with TiledVae(64, 0.25).applied(SimpleNamespace(components={"vae": vae}), "cpu"):
            assert torch.equal(vae.decode(latents).sample, expected)


def test_tiles_of_a_vae_that_returns_bare_tensors() -> None:
    torch.manual_seed(0)
    blocks = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
    channels = {f"{part}coder_block_out_channels": (8, 8, 8) for part in ("en", "de")}
    layers = {f"{part}coder_layers_per_block": (1, 1, 1) for part in ("en", "de")}
    vae = AutoencoderDC(latent_channels=4, **blocks, **channels, **layers).eval()
    latents = torch.randn(1, 4, 40, 24)
    pipe = SimpleNamespace(components={"vae": vae}, vae=vae)
    whole, _ = _decoded(pipe, latents)
    with TiledVae(64, 0.25).applied(pipe, "cpu"):
        tiled, calls = _decoded(pipe, latents)
    assert tiled.shape == whole.shape
    assert len(calls) == 3 * 2


@pytest.mark.parametrize(
    ("technique", "shape"),
    [(TiledVae(64, 0.25), (1, 4, 24, 18)), (SlicedVae(2), (5, 4, 8, 8))],
    ids=lambda x: getattr(x, "label", ""),
)
def test_hooks_of_offload_fire_once_a_decode(
    pipe: Any, technique: Technique, shape: tuple[int, int, int, int]
) -> None:
    fired: list[Any] = []
    pipe.vae._hf_hook = hook = SimpleNamespace(pre_forward=fired.append)
    with technique.applied(pipe, "cpu"):
        _decoded(pipe, _images(pipe, *shape))
    assert fired == [pipe.vae]
    assert pipe.vae._hf_hook is hook


def test_tiles_of_streamed_weights_are_those_of_resident_ones(pipes: Pipes) -> None:
    found, asked, tile = pipes["tiny-sd"], Workload(192, 128, 2), TiledVae(64, 0.25)
    with torch.no_grad(), tile.applied(found, "cpu"):
        resident = generate(found, asked, 2)
        with KINDS["streamed"]().applied(found, "cpu"):
            for _ in range(3):  # recorded, timed, streamed
                streamed = generate(found, asked, 2)
    assert (resident == streamed).all()


def test_seams_are_those_of_tiles_in_the_middle(pipe: Any) -> None:
    latents = _images(pipe, 2, 4, 40, 24)
    tile = TiledVae(64, 0.25)
    seams = tile.seams(pipe.vae, latents)
    assert seams is not None
    assert 5 < seams.seam_psnr_db < 100
    assert 5 < seams.image_psnr_db < 100
    assert pipe.vae.use_tiling is False
    with tile.applied(pipe, "cpu"):
        assert tile.seams(pipe.vae, latents) == seams
    two = tile.seams(pipe.vae, latents, 1)
    assert two is not None
    assert 5 < two.seam_psnr_db < 100
    assert two != seams
    assert tile.seams(pipe.vae, latents[..., :8, :8]) is None  # nothing is cut
    assert tile.seams(pipe.vae, latents[..., :8], 1) is None  # in one row


@pytest.mark.parametrize("technique", DECODES, ids=lambda t: t.label)
@pytest.mark.parametrize("tiling_on", [False, True])
def test_undo_leaves_the_vae_as_found(pipe: Any, technique: Any, tiling_on: bool) -> None:
    if tiling_on:
        pipe.vae.enable_tiling()
    before = dict(vars(pipe.vae))
    with technique.applied(pipe, "cpu"):
        assert vars(pipe.vae) != before
    assert vars(pipe.vae) == before
    assert pipe.vae.use_tiling is tiling_on


@pytest.mark.parametrize(
    ("tile_px", "overlap"),
    [(0, 0.25), (-64, 0.25), (500, 0.25), (512, 0.0), (512, 0.5), (512, 0.1)],
)
def test_settings_that_the_latent_grid_does_not_divide(tile_px: int, overlap: float) -> None:
    with pytest.raises(BadInput, match=r"take for example"):
        TiledVae(tile_px, overlap)


def test_the_refused_overlap_would_give_an_image_of_the_wrong_size() -> None:
    vae = kl().eval()
    vae.tile_sample_min_size, vae.tile_latent_min_size, vae.use_tiling = 64, 8, True
    vae.tile_overlap_factor = 0.2
    with torch.no_grad():
        assert vae.decode(torch.zeros(1, 4, 24, 24)).sample.shape[-1] != 24 * 8


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return facts(build("tiny-sd"))


def test_why_not_and_why_pointless(pipeline: Pipeline) -> None:
    bare = dataclasses.replace(pipeline, vae_tiles=None, vae_slices=False)
    one, two = Workload(1024, 512, 4), Workload(512, 512, 4, batch=2)
    tile, both, slices = TiledVae(512, 0.25), TiledVae(512, 0.25, sliced=True), SlicedVae()
    for technique in (tile, both, slices):
        assert technique.why_not(pipeline, device(), one) is None
        assert technique.why_not(bare, device(), one) is not None
    assert tile.why_pointless(pipeline, device(), one) is None
    assert tile.why_pointless(pipeline, device(), two) == "512x512 is one tile of 512 px"
    assert both.why_pointless(pipeline, device(), one) == "a batch of 1 is one slice"
    assert slices.why_pointless(pipeline, device(), one) == "a batch of 1 is one slice"
    assert slices.why_pointless(pipeline, device(), two) is None
    for images, reason in ((1, None), (2, "a batch of 2 is one slice")):
        assert SlicedVae(images).why_pointless(pipeline, device(), two) == reason
    assert SlicedVae(4).why_pointless(pipeline, device(), two) == "a batch of 2 is one slice"
    assert SlicedVae(4).why_not(bare, device(), two) is not None


@pytest.mark.parametrize("images", [0, -1])
def test_slices_of_no_image(images: int) -> None:
    with pytest.raises(BadInput, match="a slice has at least one"):
        SlicedVae(images)


def test_slices_of_one_image_are_named_as_before_they_had_a_size() -> None:
    labels = [t.label for t in DECODES if isinstance(t, SlicedVae)]
    sizes = [f"sliced_vae(images={n})" for n in (2, 4, 8)]
    assert labels == ["sliced_vae", *sizes]
    assert plain(SlicedVae(1)) == {"technique": "sliced_vae"}
    assert plain(SlicedVae(2)) == {"technique": "sliced_vae", "images": 2}


def test_hopes(pipeline: Pipeline) -> None:
    workload = Workload(2304, 1024, 4, batch=2)
    tiled = TiledVae(512, 0.25).effects(pipeline, workload)[Phase.DECODE]
    both = TiledVae(512, 0.25, sliced=True).effects(pipeline, workload)[Phase.DECODE]
    thin = TiledVae(512, 0.125).effects(pipeline, workload)[Phase.DECODE]
    assert tiled.activations == 512 * 512 / (2304 * 1024)
    assert both.activations == tiled.activations / 2
    assert 0.9 <= thin.seconds < tiled.seconds
    assert SlicedVae().effects(pipeline, workload)[Phase.DECODE].activations == 1 / 2


def test_hopes_for_slices(pipeline: Pipeline) -> None:
    """Small decodes are bound by their launches."""

    def hopes(side_px: int, batch: int) -> list[Effect]:
        workload = Workload(side_px, side_px, 4, batch=batch)
        sizes = (1, 2, 4, 8)
        return [SlicedVae(n).effects(pipeline, workload)[Phase.DECODE] for n in sizes]

    small, large, few = hopes(512, 32), hopes(1024, 32), hopes(512, 3)
    assert [e.activations for e in small] == [1 / 32, 1 / 16, 1 / 8, 1 / 4]
    assert [e.activations for e in few] == [1 / 3, 2 / 3, 1, 1]
    assert small[0].seconds == pytest.approx(0.026 / 0.016, rel=0.01)
    assert [e.seconds for e in small[1:]] == [1 + 0.05 / n for n in (2, 4, 8)]
    assert large[0].seconds == 1.05


def test_a_pipe_without_a_vae() -> None:
    with (
        pytest.raises(BadInput, match="no VAE"),
        SlicedVae().applied(SimpleNamespace(components={}), "cpu"),
    ):
        pass


def test_tiles_the_vae_that_names_its_scale() -> None:
    torch.manual_seed(0)
    vae = AutoencoderTiny(latent_channels=4).eval()
    latents = torch.randn(1, 4, 24, 24)
    before = dict(vars(vae))
    with torch.no_grad():
        with TiledVae(64, 0.25).applied(SimpleNamespace(components={"vae": vae}, vae=vae), "cpu"):
            assert vae.tile_latent_min_size == 8
            tiled = vae.decode(latents).sample
        assert tiled.shape == vae.decode(latents).sample.shape
    assert vars(vae) == before
