"""The image and the latents that others are compared with, kept in a file between trials."""

from __future__ import annotations

import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autofit.spec import AutofitError, Fidelity, Plan

# Below this a plan did not do what its fidelity says. In the trials of tests/golden, whose images
# are of 6 to 20 steps, numeric plans came within 46 dB of exact ones (bfloat16 for float32 among
# them) and lossy ones within 40. Trained weights may differ more than random ones: the bars are far
# below what was seen.
BARS_DB = {Fidelity.EXACT: 45.0, Fidelity.NUMERIC: 25.0, Fidelity.LOSSY: 15.0}
# Of numeric plans that compute in one dtype. One numeric technique alone comes within 56 dB in
# float16, and 60 in float32; bfloat16 rounds eight times as coarsely, and comes within 42 only (the
# tiny models on the CPU, three steps). SDXL in float16 came within 59 on the cards.
SAME_DTYPE_DB = 45.0
COARSE = "bfloat16"
# Latents have the same bars, but that what is lossy decodes otherwise, and leaves them as they
# were. Wherever both were compared these came nearer than the image: bfloat16 for float32 within 42
# dB where images came within 36 (the tiny models and SD 1.5, on the CPU), float16 within 64. Exact
# plans need not be equal: cuDNN takes another kernel where it is refused a workspace, or is told to
# try all.

Array = np.ndarray[Any, Any]

# What numpy raises of a file that is cut short, empty, written over or of something else.
FAULTS = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Reference:
    """An image to compare with, uint8, (batch, height, width, 3), and what made it."""

    image: Array
    steps: int
    plan: str  # its label
    fidelity: Fidelity  # of that plan
    dtype: str | None = None  # that its denoiser computed in; not in files of an earlier autofit
    latents: Array | None = None  # that were decoded, float32, in a row; none without a VAE

    @classmethod
    def of(
        cls,
        image: Array,
        steps: int,
        plan: Plan,
        latents: Array | None = None,
        dtype: str | None = None,
    ) -> Reference:
        return cls(image, steps, plan.label, plan.fidelity, dtype, latents)

    @classmethod
    def load(cls, path: Path | None) -> Reference | None:
        """Read what ``save`` wrote; None where there is nothing.

        Raises:
            AutofitError: the file is damaged.
        """
        if path is None or not path.exists():
            return None
        try:
            return cls._read(path)
        except FAULTS as error:
            raise AutofitError(f"reference {path} is damaged ({error})") from error

    @classmethod
    def _read(cls, path: Path) -> Reference:
        with path.open("rb") as file, np.load(file) as found:
            known = "fidelity" in found  # not in the files of an earlier autofit
            fidelity = Fidelity(str(found["fidelity"])) if known else Fidelity.LOSSY
            latents = found.get("latents", np.empty(0))  # nor these
            dtype = str(found.get("dtype", "")) or None
            image, steps, plan = found["image"], int(found["steps"]), str(found["plan"])
            return cls(image, steps, plan, fidelity, dtype, latents if latents.size else None)

    def save(self, path: Path) -> None:
        """Write it whole, or leave nothing."""
        partial = path.with_suffix(".tmp")
        try:
            with partial.open("wb") as file:
                np.savez_compressed(
                    file,
                    image=self.image,
                    steps=self.steps,
                    plan=self.plan,
                    fidelity=self.fidelity.value,
                    dtype=self.dtype or "",
                    latents=[] if self.latents is None else self.latents,
                )
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def psnr_db(self, image: Array) -> float:
        """Peak signal-to-noise ratio in dB; infinite where the images are equal."""
        return _psnr_db(image, self.image, 255.0)

    def latents_psnr_db(self, latents: Array | None) -> float | None:
        """That of the latents, whose peak is the range of the reference's; None where either was
        made without a VAE, or the file is of an earlier autofit."""
        if latents is None or self.latents is None:
            return None
        return _psnr_db(latents, self.latents, float(np.ptp(self.latents)))

    def refusal(
        self, psnr_db: float, latents_psnr_db: float | None, plan: Plan, dtype: str | None = None
    ) -> str | None:
        """Why an output so far from this one is not what the plan should make; None where it may
        be. The less faithful of the two plans decides how far that is, and of numeric ones whether
        both compute in the same ``dtype``."""
        worst = max(plan.fidelity, self.fidelity, key=lambda f: f.rank)
        is_fine = dtype is not None and dtype == self.dtype != COARSE
        numeric_db = SAME_DTYPE_DB if is_fine else BARS_DB[Fidelity.NUMERIC]
        bars_db = BARS_DB | {Fidelity.NUMERIC: numeric_db}
        latents_bars_db = bars_db | {Fidelity.LOSSY: numeric_db}
        for what, of, found_db, bar_db in (
            ("image is", "that", psnr_db, bars_db[worst]),
            ("latents are", "those", latents_psnr_db, latents_bars_db[worst]),
        ):
            if found_db is not None and found_db < bar_db:
                return (
                    f"its {what} {found_db:.1f} dB (PSNR) from {of} of {self.plan};"
                    f" {worst.value} plans come within {bar_db:g} dB"
                )
        return None


def _psnr_db(found: Array, reference: Array, peak: float) -> float:
    """Minus infinite where they have other sizes, or what was found is not finite."""
    if found.shape != reference.shape:
        return -math.inf
    error = float(np.mean((found.astype(np.float32) - reference) ** 2, dtype=np.float64))
    if error == 0:
        return math.inf
    ratio = peak**2 / error
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf
