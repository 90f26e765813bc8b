"""Cards that people own, by their vendor's figures: plans for a machine that is not at hand."""

from autofit.gpus.device import DESKTOP_BYTES, desktop_bytes, device_for
from autofit.gpus.table import Gpu, find, gpus

__all__ = [
    "DESKTOP_BYTES",
    "Gpu",
    "desktop_bytes",
    "device_for",
    "find",
    "gpus",
]
