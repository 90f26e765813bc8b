"""Everything that a plan may be made of: the candidates, and what does not go together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from autofit.spec import Device, Pipeline, Plan, Technique, Workload
from autofit.techniques.attention import ATTENTIONS
from autofit.techniques.cuda_graph import CUDA_GRAPHS
from autofit.techniques.decode import DECODES
from autofit.techniques.execution import EXECUTIONS
from autofit.techniques.feed_forward import FEED_FORWARDS
from autofit.techniques.group_norm import GROUP_NORMS
from autofit.techniques.group_offload import GROUP_OFFLOADS
from autofit.techniques.guidance import GUIDANCES
from autofit.techniques.memory_format import FORMATS
from autofit.techniques.placement import PLACEMENTS
from autofit.techniques.precision import PRECISIONS
from autofit.techniques.redirected import REDIRECTED
from autofit.techniques.streamed import STREAMED

# In the order of the slots.
CANDIDATES: tuple[Technique, ...] = (
    *PRECISIONS,
    *FORMATS,
    *GROUP_NORMS,
    *DECODES,
    *FEED_FORWARDS,
    *EXECUTIONS,
    *CUDA_GRAPHS,
    *ATTENTIONS,
    *REDIRECTED,
    *GUIDANCES,
    *PLACEMENTS,
    *GROUP_OFFLOADS,
    *STREAMED,
)

KINDS: Mapping[str, type[Technique]] = {t.name: type(t) for t in CANDIDATES}


@dataclass(frozen=True)
class Clash:
    """Two traits that one plan must not have, each on a technique of its own."""

    first_trait: str
    second_trait: str
    reason: str


CLASHES: tuple[Clash, ...] = (
    Clash(
        "traced",
        "divides_denoiser",
        "the trace bypasses the hooks that move the layers",
    ),
    Clash(
        "traced",
        "triton_group_norm",
        "a trace records torch's norms, and runs these kernels never",
    ),
    Clash(
        "regional_compile",
        "divides_denoiser",
        "the hooks that move the layers break the compiled graph",
    ),
    Clash(
        "traced",
        "hooks_layers",
        "the trace bypasses the hooks that wait for the layers' weights",
    ),
    Clash(
        "cuda_graph",
        "divides_denoiser",
        "a graph reads each weight at one address, and these layers come to others",
    ),
    Clash(
        "cuda_graph",
        "model_offload",
        "the denoiser comes to other addresses for every image, where no graph of it is valid",
    ),
    Clash(
        "two_passes",
        "streams_denoiser",
        "each layer runs twice a step, and the order of prefetching assumes once",
    ),
    Clash(
        "chunked_feed_forward",
        "divides_denoiser",
        "the hooks would bring a layer's weights anew for every chunk",
    ),
)


def why_not(plan: Plan, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
    """Return the first reason why a plan is not legal, and the technique that it concerns.

    Each technique is asked of the facts as the techniques before it leave them.
    """
    for technique in plan.techniques:
        reason = technique.why_not(pipeline, device, workload)
        if reason is not None:
            return f"{technique.label}: {reason}"
        pipeline = technique.facts(pipeline)
    return clash(plan.techniques)


def clash(techniques: tuple[Technique, ...]) -> str | None:
    """Return why two of these techniques do not go together, or None."""
    for first, second in permutations(techniques, 2):
        for row in CLASHES:
            if row.first_trait in first.traits and row.second_trait in second.traits:
                return f"{first.label}: not with {second.label}: {row.reason}"
    return None


def images_to_settle(plan: Plan) -> int:
    """How many images a plan takes to run as it will from then on: layers that stream have their
    places by the end of the first, and only then can a graph of them be captured."""
    traits = frozenset().union(*(t.traits for t in plan.techniques))
    return 2 if {"cuda_graph", "hooks_layers"} <= traits else 1


def options(
    pipeline: Pipeline, device: Device, workload: Workload
) -> tuple[tuple[Technique, str | None], ...]:
    """Return every candidate with the reason why it cannot be applied or would do nothing."""
    return tuple(
        (t, t.why_not(pipeline, device, workload) or t.why_pointless(pipeline, device, workload))
        for t in CANDIDATES
    )


@contextmanager
def applied(plan: Plan, pipe: Any, device: str) -> Iterator[None]:
    """Apply a plan's techniques in order; undo them in reverse on exit, or where one fails."""
    with ExitStack() as undo:
        for technique in plan.techniques:
            undo.enter_context(technique.applied(pipe, device))
        yield
