"""The image that the others are compared with, kept in a file between trials."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Reference:
    """An image to compare with, uint8, (batch, height, width, 3), and what made it."""

    image: np.ndarray[Any, Any]
    steps: int
    plan: str  # its label

    @classmethod
    def load(cls, path: Path | None) -> Reference | None:
        if path is None or not path.exists():
            return None
        with np.load(path) as found:
            return cls(found["image"], int(found["steps"]), str(found["plan"]))

    def save(self, path: Path) -> None:
        partial = path.with_suffix(".tmp")
        with partial.open("wb") as file:
            np.savez_compressed(file, image=self.image, steps=self.steps, plan=self.plan)
        partial.replace(path)

    def psnr_db(self, image: np.ndarray[Any, Any]) -> float | None:
        """Peak signal-to-noise ratio in dB; infinite where the images are equal."""
        if image.shape != self.image.shape:
            return None
        error = np.mean((image.astype(np.float32) - self.image.astype(np.float32)) ** 2)
        return math.inf if error == 0 else 10 * math.log10(255**2 / float(error))
