"""How near tiles come to an untiled decode: autofit's, beside diffusers' with its default overlap.

    python scripts/measure_seams.py MODEL --size 2048x2048 [--device cuda:0] [--dtype float16]

A JSON line for each tile that cuts the size: peak signal-to-noise ratio in dB over the image, and
over all pixels that are a seam in either. MODEL is a built-in (random weights), a folder or a Hub
id. The untiled decode must fit: for 4k it takes 23 GiB in half precision. Exit code 1 if autofit's
tiles are further from it than diffusers' of the same size.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from typing import Any

import torch

from autofit import anatomy, architectures, tiling
from autofit.techniques.decode import DECODES, TiledVae
from autofit.tiling import Cuts, Grid
from autofit.units import parse_pixels

THEIR_OVERLAP = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--size", default="2048x2048")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dtype", help="as loaded, unless said")
    given = parser.parse_args()
    vae: Any = anatomy.vae(architectures.load(given.model, dtype=given.dtype))
    vae = vae.to(given.device).eval()
    width, height = parse_pixels(given.size)
    scale = scale_of(vae)
    shape = 1, vae.config.latent_channels, height // scale, width // scale
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    latents = latents.to(given.device, vae.dtype)
    worse = False
    for technique in DECODES:
        cuts_it = isinstance(technique, TiledVae) and technique.tile_px < max(width, height)
        if not cuts_it or technique.sliced:
            continue
        found = compared(vae, latents, technique.grid(scale))
        worse |= any(found["autofit"][k] < found["diffusers"][k] for k in found["autofit"])
        asked = {"model": given.model, "size": given.size, "dtype": str(vae.dtype)[6:]}
        print(json.dumps(asked | technique.settings | found), flush=True)
    sys.exit(1 if worse else 0)


def scale_of(vae: Any) -> int:
    """Pixels a latent position, along a side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


@torch.no_grad()
def compared(vae: Any, latents: torch.Tensor, grid: Grid) -> dict[str, dict[str, float]]:
    """Of both kinds of tiles, in dB: the whole image, and all that is a seam in either, for an
    error in one place says nothing about another place."""
    scale = scale_of(vae)
    rows, columns = (grid.cut(side) for side in latents.shape[-2:])
    whole = vae.decode(latents).sample
    ours = tiling.decoded(lambda z: vae.decode(z).sample, latents, rows, columns)
    bands = tiling.bands(rows, columns, scale)
    overlap = int(grid.tile * THEIR_OVERLAP)
    bands |= tiling.bands(*(_their_cuts(s, grid.tile, overlap) for s in latents.shape[-2:]), scale)
    bands = bands.to(latents.device)
    made = {"autofit": ours, "diffusers": _theirs(vae, latents, grid.tile, scale)}
    return {
        name: {
            "image_psnr_db": tiling.psnr_db(image, whole),
            "seam_psnr_db": tiling.psnr_db(image[..., bands], whole[..., bands]),
        }
        for name, image in made.items()
    }


def _theirs(vae: Any, latents: torch.Tensor, tile: int, scale: int) -> torch.Tensor:
    settings = {
        "use_tiling": True,
        "tile_latent_min_size": tile,
        "tile_sample_min_size": tile * scale,
        "tile_overlap_factor": THEIR_OVERLAP,
    }
    with ExitStack() as undo:
        for name, value in settings.items():
            undo.enter_context(anatomy.attribute(vae, name, value))
        image: torch.Tensor = vae.decode(latents).sample
    return image


def _their_cuts(size: int, tile: int, overlap: int) -> Cuts:
    """The last tile is as long as what is left."""
    return Cuts(size, tile, tuple(range(0, size, tile - overlap)))


if __name__ == "__main__":
    main()
