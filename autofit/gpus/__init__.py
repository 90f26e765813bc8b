"""Cards that people own, by their vendor's figures: plans for a machine that is not at hand."""

from autofit.gpus.device import DESKTOP_BYTES, SOURCE, desktop_bytes, device_for, from_table
from autofit.gpus.table import Gpu, find, gpus

__all__ = [
    "DESKTOP_BYTES",
    "SOURCE",
    "Gpu",
    "desktop_bytes",
    "device_for",
    "find",
    "from_table",
    "gpus",
]
