"""The nouns, frozen. Standard library only: everything else imports this file, it imports nothing.

A size is an ``int`` of bytes and says so in its name; seconds end in ``_s``; pixels in ``_px``.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, ClassVar, Literal

DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}
BFLOAT16_CAPABILITY = (8, 0)  # Ampere; before it bfloat16 is emulated
HEAD_SIZES = (4, *range(8, 136, 8), 160, 192, 256)  # of attention, that kernels are asked for
# ``Device.launch_s`` where it was not probed: on the host of the H200 of tests/golden a step of
# SDXL, all resident, took 0.0573 s for what counts as 1,276 operations of modules (roofline.py).
LAUNCH_S = 4.5e-5
# What a measurement depends on besides the card: of the versions that ``Device`` holds, these.
SOFTWARE = (
    "torch", "cuda", "cudnn", "diffusers", "transformers", "accelerate", "xformers",
    "sageattention", "driver",
)  # fmt: skip


# ---------------------------------------------------------------- errors


class AutofitError(Exception):
    """What, which value, what to do: one line for the user. The exit code is the command line's."""

    exit_code: ClassVar[int] = 1


class BadInput(AutofitError, ValueError):
    """The caller asked for something that cannot be: a size, a model, a profile."""

    exit_code = 2


class NothingFits(AutofitError):
    """No legal plan stays within the budget."""

    exit_code = 3

    def __init__(self, message: str, smallest_bytes: int | None = None) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


# ---------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Workload:
    """What one call of the pipe makes.

    ``passes`` is the number of denoiser passes a step: 2 with classifier-free guidance, else 1.
    """

    width: int
    height: int
    steps: int
    batch: int = 1
    frames: int = 1
    passes: int = 1

    @property
    def pixels(self) -> int:
        return self.width * self.height


class Phase(StrEnum):
    """The parts of a generation. A technique touches known phases: plans are composed from them."""

    ENCODE = "encode"  # text encoders, and all before the first denoiser call
    STEP = "step"  # one denoising step
    DECODE = "decode"  # VAE decode, and all after it


# ---------------------------------------------------------------- what it runs on


@dataclass(frozen=True)
class Kernel:
    """One attention kernel that was run on the device and answered."""

    name: str  # cudnn, flash, efficient, math, xformers, sage
    dtype: str
    head_size: int


@dataclass(frozen=True)
class Device:
    """A device, probed. Rates are measured, in bytes or floating-point operations a second.

    ``launch_s`` is the host's: Python, diffusers and torch for one operation of a module (a
    product, a norm, an activation), eagerly. On the CPU the smallest operation's own time is in it.
    """

    kind: Literal["cuda", "cpu"]
    name: str
    total_bytes: int
    capability: tuple[int, int] | None
    context_bytes: int  # what the process holds on the card before torch's first tensor
    host_limit_bytes: int  # host memory that may be used: cgroups' limits and --host-ram included
    pinned_bytes_s: float  # host to device
    pageable_bytes_s: float
    memory_bytes_s: float  # device memory, read plus written
    flops_s: Mapping[str, float] = field(hash=False)  # matrix products, by dtype
    kernels: tuple[Kernel, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)
    launch_s: float = LAUNCH_S

    @property
    def is_at_hand(self) -> bool:
        """Whether this host has it; else it is a row of the table of cards."""
        return "source" not in self.versions

    def answers(self, kernel: str, dtype: str, head_sizes: tuple[int, ...]) -> bool:
        """Whether this attention kernel ran for every one of these head sizes."""
        return all(Kernel(kernel, dtype, size) in self.kernels for size in head_sizes)


class Role(StrEnum):
    ENCODER = "encoder"  # runs once before the steps
    DENOISER = "denoiser"  # runs every step
    VAE = "vae"
    OTHER = "other"


@dataclass(frozen=True)
class BlockList:
    """A ``ModuleList`` of a component: what block-level offload moves one by one."""

    path: str
    count: int
    largest_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Component:
    name: str
    cls: str
    role: Role
    dtype: str
    weight_bytes: int
    largest_leaf_bytes: int  # the most that one module owns itself
    blocks: tuple[BlockList, ...] = ()
    groups: bool = True  # diffusers' group offload supports it
    convolutional: bool = False
    group_norms: bool = False
    leaves: int = 0  # modules with weights of their own: what leaf-level offload hooks
    mapped_bytes: int = 0  # of its weights, what lies in mapped files: the host may forget it
    kept_bytes: int = 0  # of its weights in float32, what a cast to float16 leaves so
    neighbours_bytes: int = 0  # the most that two blocks hold that run one after the other

    @property
    def largest_blocks_bytes(self) -> int:
        """The most of its block lists that block-level offload holds: two blocks."""
        twice_bytes = 2 * max((b.largest_bytes for b in self.blocks), default=0)
        return self.neighbours_bytes or twice_bytes  # in facts of before it was read

    @property
    def largest_block_bytes(self) -> int:
        """The most that block-level offload holds of it: two blocks and all outside block lists."""
        if not self.blocks:
            return self.weight_bytes
        outside = self.weight_bytes - sum(b.total_bytes for b in self.blocks)
        return outside + self.largest_blocks_bytes


@dataclass(frozen=True)
class Pipeline:
    """Facts about a pipe, read without running it."""

    cls: str
    components: tuple[Component, ...]
    fingerprint: str  # of classes, configurations, shapes and dtypes; not of the weights' values
    default_width: int
    default_height: int
    size_multiple_px: int  # width and height must be multiples of this
    token_px: int  # side of the square of pixels that is one denoiser position at full resolution
    hidden_size: int  # channels of the denoiser at full resolution
    head_sizes: tuple[int, ...]
    default_steps: int
    default_passes: int
    batched_guidance: bool  # both guidance passes run as one batch of twice the size
    offload_sequence: tuple[str, ...] = ()  # diffusers' model_cpu_offload_seq
    repeated_blocks: tuple[str, ...] = ()  # classes that regional compile compiles
    sliceable_attention: bool = False
    feed_forward_bound: bool = False  # feed-forward layers hold the most, and take any tokens
    vae_slices: bool = False
    vae_tiles: Literal["attributes", "arguments"] | None = None
    vae_upcasts: bool = False  # its configuration asks for float32 when the VAE is float16
    vae_channels: int = 128  # of the decoder at full resolution
    adapters: tuple[str, ...] = ()  # names of those that are loaded
    takes_frames: bool = False  # its call asks how many

    def __hash__(self) -> int:
        """Of what a precision changes, and the fingerprint: facts are looked up plan by plan."""
        return hash((self.fingerprint, *(c.dtype for c in self.components)))

    @property
    def denoiser(self) -> Component:
        return next(c for c in self.components if c.role is Role.DENOISER)

    @property
    def vae(self) -> Component | None:
        return next((c for c in self.components if c.role is Role.VAE), None)

    @property
    def weight_bytes(self) -> int:
        return sum(c.weight_bytes for c in self.components)

    def of_role(self, *roles: Role) -> tuple[Component, ...]:
        return tuple(c for c in self.components if c.role in roles)


# ---------------------------------------------------------------- techniques and plans


class Fidelity(StrEnum):
    """How close the output stays to the pipe as found; a plan is as faithful as its worst."""

    EXACT = "exact"  # the same arithmetic
    NUMERIC = "numeric"  # the same function, rounded otherwise
    LOSSY = "lossy"  # another function

    @cached_property
    def rank(self) -> int:
        return list(Fidelity).index(self)


class Slot(StrEnum):
    """What competes for one place in a plan, in order of application.

    Placement comes last: model offload re-installs its hooks after every call and would drop what
    wraps the denoiser above them. Execution comes before attention and guidance, which wrap it,
    and after the feed-forward layers, which it holds.
    """

    PRECISION = "precision"
    DENOISER_FORMAT = "denoiser_format"
    VAE_FORMAT = "vae_format"
    NORM = "norm"
    DECODE = "decode"
    FEED_FORWARD = "feed_forward"
    EXECUTION = "execution"
    ATTENTION = "attention"
    GUIDANCE = "guidance"
    PLACEMENT = "placement"

    @cached_property
    def order(self) -> int:
        return list(Slot).index(self)


@dataclass(frozen=True)
class Effect:
    """What a technique is hoped to change in one phase: factors on seconds and on activation bytes.

    Hopes, not promises: they order the trials. The search corrects them with what it measures, so
    a factor stands at the good end of what was ever seen. ``stays``: the memory of this phase's
    activations is not given back, and is taken in every other phase too.

    ``seconds`` are those of the phase as a whole. Where it is known how long the device is busy and
    how long the host launches, the factors on these two count instead.
    """

    seconds: float = 1.0
    activations: float = 1.0
    stays: bool = False
    launches: float = 1.0
    busy: float | None = None  # the same as on ``seconds``

    @property
    def on_busy(self) -> float:
        return self.seconds if self.busy is None else self.busy


@dataclass(frozen=True)
class Technique(ABC):
    """A change to a pipe with its exact undo. A frozen dataclass: its fields are its settings."""

    name: ClassVar[str]
    slot: ClassVar[Slot]
    reversible: ClassVar[bool] = True
    hope: ClassVar[float] = 0.25  # by how much its phases may be faster than it states, until seen
    is_sure: ClassVar[bool] = False  # it gains where it works: no trial need tell it apart

    @property
    @abstractmethod
    def fidelity(self) -> Fidelity:
        """A class variable of most techniques; of some it follows from the settings."""

    @abstractmethod
    def applied(self, pipe: Any, device: str) -> AbstractContextManager[None]:
        """Apply to ``pipe`` for runs on ``device`` ("cuda:0", "cpu"); undo exactly on exit."""

    def why_not(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        """The reason why this cannot be applied here, or None. Asked of the facts as they stand
        when this technique's turn comes: a precision before it has changed the dtypes."""
        return None

    def why_pointless(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        """The reason why this could be applied here but would do nothing, or None."""
        return None

    def facts(self, pipeline: Pipeline) -> Pipeline:
        """The facts of the pipe with this applied."""
        return pipeline

    def effects(self, pipeline: Pipeline, workload: Workload) -> Mapping[Phase, Effect]:
        """The phases that this touches, and what is hoped for there."""
        return {}

    @property
    def setup_s(self) -> float:
        """Seconds that this is hoped to add to a plan's set-up, once; as low as it was ever seen.
        What a study measures takes its place."""
        return 0.0

    @property
    def traits(self) -> frozenset[str]:
        """What the rows of CLASHES may name: the technique, and what its settings make it."""
        return frozenset({self.name})

    def fallbacks(self, pipe: Any) -> tuple[str, ...]:
        """What ``pipe`` had to do without since this was applied to it, and why, in a sentence
        each. They go into profiles, which travel: they name no folder."""
        return ()

    @property
    def settings(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @cached_property
    def label(self) -> str:
        """``tiled_vae(tile_px=512, overlap=0.25)``: settings that are off or None left out."""
        text = ", ".join(
            k if v is True else f"{k}={v}"
            for k, v in self.settings.items()
            if v is not False and v is not None
        )
        return f"{self.name}({text})" if text else self.name


@dataclass(frozen=True)
class Traffic:
    """Weight bytes that one phase moves: each byte over the bus, at the pinned or pageable rate."""

    pinned_bytes: int = 0
    pageable_bytes: int = 0
    back_bytes: int = 0  # device to host, pageable
    overlaps: bool = False  # with the compute of the same phase
    hooks: int = 0  # run by Python, one for each group of weights moved


@dataclass(frozen=True)
class Placement(Technique):
    """Where the weights are in each phase. Every plan has exactly one."""

    slot: ClassVar[Slot] = Slot.PLACEMENT
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    hope: ClassVar[float] = 0.05  # transfers are arithmetic, and all placements compute the same

    @property
    def is_open(self) -> bool:
        """Whether a setting waits for the budget: ``fitted`` sets it."""
        return False

    @property
    def opened(self) -> Placement:
        """This, with the fewest weights on the device that it can do with: what ``fitted`` sets is
        left open again."""
        return self

    @property
    def borrows(self) -> bool:
        """Whether weights lie in memory of the decode while it does not run: then the activations
        of steps cannot."""
        return False

    @property
    def page_locks(self) -> bool:
        """Whether it page-locks weights in host memory, which makes any copy of them faster."""
        return False

    @property
    def from_files(self) -> bool:
        """Whether weights that lie in mapped files are left there, and read when they are used."""
        return False

    def fitted(
        self, pipeline: Pipeline, room_bytes: int, decode_bytes: int = 0
    ) -> Placement | None:
        """This, set to use ``room_bytes`` for weights; None where it cannot do with so few.
        ``decode_bytes`` is what the allocator needs for the activations of the decode."""
        return self

    @abstractmethod
    def resident_bytes(self, pipeline: Pipeline, phase: Phase) -> int:
        """The most weight bytes on the device in this phase."""

    @abstractmethod
    def traffic(self, pipeline: Pipeline, phase: Phase) -> Traffic:
        """Weight bytes moved in one run of this phase."""

    @property
    def moves(self) -> bool:
        """Whether weights come and go while an image is made."""
        return True

    def apart_bytes(self, pipeline: Pipeline, phase: Phase) -> int:
        """Device memory beside ``resident_bytes`` that activations cannot have in this phase:
        torch's allocator keeps what copies were made into for the stream that made them."""
        return 0

    def copied_bytes(self, pipeline: Pipeline) -> int:
        """Weight bytes that are in host memory twice: the originals, held for the undo, and those
        that came back from the device."""
        return 0

    def locked_bytes(self, pipeline: Pipeline) -> int:
        """Weight bytes that it cannot do without page-locking."""
        return 0


@dataclass(frozen=True)
class Plan:
    """At most one technique a slot, in order of application, and exactly one placement."""

    techniques: tuple[Technique, ...]

    def __post_init__(self) -> None:
        slots = [t.slot for t in self.techniques]
        if slots != sorted(set(slots), key=lambda s: s.order) or Slot.PLACEMENT not in slots:
            raise BadInput(
                f"plan {self.label}: one placement, at most one technique a slot, in the order"
                f" {', '.join(s.value for s in Slot)}"
            )

    @property
    def label(self) -> str:
        return " + ".join(t.label for t in self.techniques)

    @property
    def fidelity(self) -> Fidelity:
        return max((t.fidelity for t in self.techniques), key=lambda f: f.rank)

    @property
    def placement(self) -> Placement:
        placement = self.techniques[-1]
        assert isinstance(placement, Placement)
        return placement

    def fallbacks(self, pipe: Any) -> tuple[str, ...]:
        return tuple(told for t in self.techniques for told in t.fallbacks(pipe))

    def at(self, slot: Slot) -> Technique | None:
        return next((t for t in self.techniques if t.slot is slot), None)

    def facts(self, pipeline: Pipeline) -> Pipeline:
        for technique in self.techniques:
            pipeline = technique.facts(pipeline)
        return pipeline


# ---------------------------------------------------------------- what comes of a plan


@dataclass(frozen=True)
class Prediction:
    """Arithmetic, before anything runs."""

    peak_bytes: int
    image_s: float
    phase_s: Mapping[Phase, float] = field(hash=False)
    phase_bytes: Mapping[Phase, int] = field(hash=False)


@dataclass(frozen=True)
class Measurement:
    """One plan, run. Raw seconds and bytes; nothing is rounded.

    ``peak_bytes`` is what the card must hold: the allocator's reserved bytes at their highest,
    warm-up included, plus what is not the allocator's (context, libraries). On the CPU it is the
    bytes of tensors alive at their highest. ``image_s`` is a whole generation; in a short trial it
    is extrapolated as encode + first step + (steps - 1) x median of the later steps + decode,
    the steps being the scheduler's.
    """

    image_s: float
    peak_bytes: int
    encode_s: float
    step_s: tuple[float, ...]  # the first one may carry transfers
    decode_s: float
    warmup_s: float  # applying the plan and the first generation: transfers, compiling, tuning
    phase_peak_bytes: Mapping[str, int] = field(hash=False)  # of live tensors, weights included
    non_torch_bytes: int = 0
    steps_run: int = 0
    runs_s: tuple[float, ...] = ()  # whole generations, when verified in full
    verified: bool = False
    psnr_db: float | None = None  # against the reference output; None where there was none
    reference: str | None = None  # the plan that made the reference
    starved: int = 0  # allocations refused and done without: cuDNN takes a slower kernel then
    latents_psnr_db: float | None = None  # as ``psnr_db``, of the latents that were decoded
    seam_psnr_db: float | None = None  # over seams of a tiled decode, against an untiled one
    fallbacks: tuple[str, ...] = ()  # what of the plan was done without, and why


class Why(StrEnum):
    """Why a trial has no measurement."""

    OUT_OF_MEMORY = "out of memory"
    OVER_BUDGET = "over budget"
    TOO_SLOW = "cannot win"
    ERROR = "error"
    BAD_OUTPUT = "bad output"
    CRASH = "crash"
    HANG = "hang"

    @property
    def is_fault(self) -> bool:
        """Whether it says nothing about memory or time."""
        return self in (Why.ERROR, Why.BAD_OUTPUT, Why.CRASH, Why.HANG)


@dataclass(frozen=True)
class Failure:
    """A trial without a measurement is a result too. ``phase`` is where it ended, when known;
    ``step_s`` the seconds that a step took, where it ended for being slow."""

    why: Why
    detail: str
    phase: Phase | None = None
    needed_bytes: int | None = None
    step_s: float | None = None


Outcome = Measurement | Failure


@dataclass(frozen=True)
class Attempt:
    """One trial of a study: the plan and what came of it."""

    plan: Plan
    outcome: Outcome


@dataclass(frozen=True)
class Environment:
    """What a measurement depends on besides the plan. Rates are None in profiles of schema 1."""

    device: str
    capability: tuple[int, int] | None
    total_bytes: int
    cap: Literal["emulated", "card", "tracked"]  # allocator capped below the card; the card; CPU
    versions: Mapping[str, str] = field(hash=False)
    pinned_bytes_s: float | None = None  # host to device, measured
    pageable_bytes_s: float | None = None

    @property
    def machine(self) -> tuple[str | int | None, ...]:
        """The same where a measurement can be taken for another: the card and SOFTWARE."""
        return self.device, self.total_bytes, *map(self.versions.get, SOFTWARE)


@dataclass(frozen=True)
class Part:
    """What a profile says of a component, for a reader who asks why another one does not match."""

    name: str
    cls: str
    dtype: str
    weight_bytes: int

    @classmethod
    def of(cls, component: Component) -> Part:
        return cls(component.name, component.cls, component.dtype, component.weight_bytes)


@dataclass(frozen=True)
class Rung:
    """A leaner plan of the same study, to step down to; a short trial measured it."""

    plan: Plan
    measured: Measurement


@dataclass(frozen=True)
class Evidence:
    """What came of a profile's plan on a machine that ran it again. A failure has no detail: the
    words of an error may hold a path."""

    outcome: Outcome
    on: Environment


@dataclass(frozen=True)
class Profile:
    """A plan with what it was measured for and on. What is stored, shared and applied.

    ``ladder``: leaner plans, each slower than the one before it. ``evidence``: of every machine
    that verified the plan since, the latest outcome.
    """

    pipeline: str  # class
    fingerprint: str
    workload: Workload
    budget_bytes: int
    plan: Plan
    measured: Measurement
    on: Environment
    components: tuple[Part, ...] = ()  # none in profiles of schema 1
    adapters: tuple[str, ...] = ()
    ladder: tuple[Rung, ...] = ()
    evidence: tuple[Evidence, ...] = ()
