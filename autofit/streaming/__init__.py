"""Partial residency: what fits stays on the device, the rest streams at the bus's speed."""

from autofit.streaming.engine import streaming

__all__ = ["streaming"]
