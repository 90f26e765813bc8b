"""The image that the others are compared with, kept in a file between trials."""

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

# What numpy raises of a file that is cut short, empty, written over or of something else.
FAULTS = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Reference:
    """An image to compare with, uint8, (batch, height, width, 3), and what made it."""

    image: np.ndarray[Any, Any]
    steps: int
    plan: str  # its label
    fidelity: Fidelity  # of that plan

    @classmethod
    def of(cls, image: np.ndarray[Any, Any], steps: int, plan: Plan) -> Reference:
        return cls(image, steps, plan.label, plan.fidelity)

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
            return cls(found["image"], int(found["steps"]), str(found["plan"]), fidelity)

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
                )
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def psnr_db(self, image: np.ndarray[Any, Any]) -> float | None:
        """Peak signal-to-noise ratio in dB; infinite where the images are equal."""
        if image.shape != self.image.shape:
            return None
        error = np.mean((image.astype(np.float32) - self.image.astype(np.float32)) ** 2)
        return math.inf if error == 0 else 10 * math.log10(255**2 / float(error))

    def refusal(self, psnr_db: float | None, plan: Plan) -> str | None:
        """Why an image so far from this one is not what the plan should make; None where it may
        be. The less faithful of the two plans decides how far that is."""
        worst = max(plan.fidelity, self.fidelity, key=lambda f: f.rank)
        if psnr_db is None or psnr_db >= BARS_DB[worst]:
            return None
        return (
            f"its image is {psnr_db:.1f} dB (PSNR) from that of {self.plan}; {worst.value} plans"
            f" come within {BARS_DB[worst]:g} dB"
        )
