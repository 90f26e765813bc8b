"""What the caller asks for: a goal, understood and checked against what the pipe can make."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from autofit import architectures
from autofit.spec import BadInput, Device, Fidelity, NothingFits, Pipeline, Workload
from autofit.units import format_bytes, parse_size

SUGGESTION = 1.02  # on the smallest peak, so that what we suggest works: above cost.MARGIN
MOST_PX = 16384 * 16384  # an image: a dry run of a larger one takes minutes, and none is known
MOST = 100_000  # images a call, steps, frames: beyond it a prompt's list alone fills the memory


@dataclass(frozen=True)
class Goal:
    """What to plan for, as the caller said it; None takes the model's own default, and of host
    memory all that this process may use.

    Raises:
        BadInput: a value that no model could make; that is found out before one is loaded.
    """

    budget: str | int
    size: tuple[int, int] | None = None
    batch: int = 1
    steps: int | None = None
    frames: int = 1
    fidelity: str = "lossy"
    host_ram: str | int | None = None

    def __post_init__(self) -> None:
        _size_bytes("budget", self.budget)
        if self.host_ram is not None:
            _size_bytes("host_ram", self.host_ram)
        fidelity_named(self.fidelity)
        if self.size is not None and not _is_pair(self.size):
            raise BadInput(f"size {self.size!r}: give (width, height) in pixels, as (1024, 1024)")
        if self.size is not None and self.size[0] * self.size[1] > MOST_PX:
            size = "x".join(map(str, self.size))
            raise BadInput(
                f"size {size}: more pixels than 16384x16384; write for example 1024x1024"
            )
        for name in ("batch", "steps", "frames"):
            _check_count(name, getattr(self, name))

    @property
    def budget_bytes(self) -> int:
        return _size_bytes("budget", self.budget)

    @property
    def host_ram_bytes(self) -> int | None:
        return None if self.host_ram is None else _size_bytes("host_ram", self.host_ram)

    def hosted(self, device: Device) -> Device:
        """The device with no more host memory than is asked for."""
        if self.host_ram_bytes is None or self.host_ram_bytes >= device.host_limit_bytes:
            return device
        return replace(device, host_limit_bytes=self.host_ram_bytes)


def workload_for(pipeline: Pipeline, goal: Goal, defaults: str | None = None) -> Workload:
    """The workload that is asked for, checked against what the pipe can make.

    Raises:
        BadInput: a side that the VAE and the denoiser cannot divide, or frames of an image.
    """
    known = next((a for a in architectures.ARCHITECTURES if a.name == defaults), None)
    own = (
        (known.width, known.height) if known else (pipeline.default_width, pipeline.default_height)
    )
    width, height = goal.size or own
    multiple = pipeline.size_multiple_px
    if width % multiple or height % multiple or min(width, height) < multiple:
        near = [max(multiple, round(side / multiple) * multiple) for side in (width, height)]
        raise BadInput(
            f"size {width}x{height}: {pipeline.cls} needs multiples of {multiple} pixels;"
            f" the nearest is {near[0]}x{near[1]}"
        )
    if goal.frames > 1 and not pipeline.takes_frames:
        raise BadInput(f"frames {goal.frames}: {pipeline.cls} makes images; leave out --frames")
    own_steps = known.steps if known else pipeline.default_steps
    steps = own_steps if goal.steps is None else goal.steps
    return Workload(width, height, steps, goal.batch, goal.frames, pipeline.default_passes)


def too_little(what: str, smallest_bytes: int) -> NothingFits:
    """The error that says ``what`` does not fit, and suggests a budget in which something does."""
    enough = math.ceil(smallest_bytes * SUGGESTION / 1e6)
    smallest = format_bytes(smallest_bytes)
    return NothingFits(
        f"{what}; the smallest needs {smallest}: try --budget {enough}MB", smallest_bytes
    )


def fidelity_named(text: str) -> Fidelity:
    try:
        return Fidelity(text)
    except ValueError:
        known = ", ".join(f.value for f in Fidelity)
        raise BadInput(f"fidelity {text!r}: one of {known}") from None


def _is_pair(size: Any) -> bool:
    is_sequence = isinstance(size, tuple | list)
    return is_sequence and len(size) == 2 and all(isinstance(side, Integral) for side in size)


def _check_count(name: str, count: Any) -> None:
    if count is None:
        return
    if not isinstance(count, Integral):
        raise BadInput(f"{name} {count!r}: give a whole number")
    if int(count) < 1:
        raise BadInput(f"{name} {count} is below 1; write for example --{name} 1")
    if int(count) > MOST:
        raise BadInput(f"{name} {count} is above {MOST}; write for example --{name} 1")


def _size_bytes(name: str, size: str | int) -> int:
    if isinstance(size, str):
        return parse_size(size, name)
    if not isinstance(size, int):
        raise BadInput(f"{name} {size!r}: give a text such as '8GB', or whole bytes")
    if size <= 0:
        raise BadInput(f"{name} {size} bytes is not above zero; write for example '8GB'")
    return size
