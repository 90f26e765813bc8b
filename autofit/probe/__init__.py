"""Read facts, decide nothing: a torch device becomes a Device, a diffusers pipe a Pipeline."""

from autofit.probe.device import device_named, probe_device
from autofit.probe.memory import card_name
from autofit.probe.pipeline import batches_guidance, dtype_of, facts, fingerprint

__all__ = [
    "batches_guidance",
    "card_name",
    "device_named",
    "dtype_of",
    "facts",
    "fingerprint",
    "probe_device",
]
