"""The denoiser's kernels as one CUDA graph: a step is one launch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from autofit import anatomy, fallbacks
from autofit.fallbacks import Fallbacks, asks_for
from autofit.lazy import nn, pytree, torch
from autofit.spec import (
    Device,
    Effect,
    Fidelity,
    Phase,
    Pipeline,
    Slot,
    Technique,
    Workload,
)
from autofit.techniques.capture import Capturer, NotCapturable, Still, Weights
from autofit.techniques.execution import (
    INCOMPARABLE,
    RegionalCompile,
    filled,
    signature_of,
    tensors_of,
    without_tensors,
)

# Each costs three forwards and memory. Inputs that vary more than this run eagerly: to drop the
# oldest graph would mean a capture at every call where a constant differs from step to step.
MAX_GRAPHS = 8
LAUNCHES = 0.02  # of an eager step's: copies of the inputs and one launch
MOVED = "its weights moved since the capture, and a graph has their addresses"


@dataclass(frozen=True)
class CudaGraph(Technique):
    """Capture the denoiser in a CUDA graph and replay it: one launch a step, and no Python in it.

    A graph holds for one signature of the inputs and is captured at the first call with it. Inputs
    are copied into memory of its own and outputs out of it, so that a caller's tensors are the
    caller's. What cannot be captured runs as it did, and is logged and told by ``fallbacks``: a
    forward that waits for the device, more signatures than ``MAX_GRAPHS``, weights that moved
    since.

    ``compiled`` captures it with its repeated blocks compiled, as ``RegionalCompile`` does.
    """

    name: ClassVar[str] = "cuda_graph"
    slot: ClassVar[Slot] = Slot.EXECUTION

    compiled: bool = False

    @property
    def fidelity(self) -> Fidelity:
        """A replay runs the kernels that an eager forward launches, on the same values."""
        return RegionalCompile.fidelity if self.compiled else Fidelity.EXACT

    def why_not(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        if device.kind != "cuda":
            return "CUDA graphs need CUDA"
        return RegionalCompile().why_not(pipeline, device, workload) if self.compiled else None

    def effects(self, pipeline: Pipeline, workload: Workload) -> Mapping[Phase, Effect]:
        """A graph's memory is its own as long as it lives: no other phase can use it.

        On an H200: SD 1.5 at 512x512 took 0.0119 s a step where eager took 0.021 to 0.03, SDXL at
        1024x1024 0.0417 where eager took 0.0548, and 0.0397 with compiled blocks.
        """
        if not self.compiled:
            return {Phase.STEP: Effect(seconds=0.5, stays=True, launches=LAUNCHES, busy=1.0)}
        blocks = RegionalCompile().effects(pipeline, workload)[Phase.STEP]
        captured = replace(blocks, seconds=0.47, stays=True, launches=LAUNCHES)
        return {Phase.STEP: captured}

    @property
    def setup_s(self) -> float:
        """In tests/golden the set-up of SDXL took 1.58 s with a graph, 1.30 s without."""
        return 0.3 + (RegionalCompile.setup_s if self.compiled else 0.0)

    def fallbacks(self, pipe: Any) -> tuple[str, ...]:
        return fallbacks.texts_of(anatomy.denoiser(pipe))

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        with ExitStack() as undo:
            if self.compiled:
                undo.enter_context(RegionalCompile().applied(pipe, device))
            denoiser = anatomy.denoiser(pipe)
            graphs = _Graphs(denoiser, denoiser.forward, torch.device(device))
            undo.callback(graphs.drop)

            @functools.wraps(denoiser.forward)
            def forward(*args: Any, **kwargs: Any) -> Any:
                return graphs.run(args, kwargs)

            forward.graphs = graphs  # type: ignore[attr-defined]  # who moves its weights says so
            forward.fallbacks = graphs.fallbacks  # type: ignore[attr-defined]
            undo.enter_context(anatomy.attribute(denoiser, "forward", forward))
            yield


class _Graphs:
    """The graphs of one denoiser, by the signature of the inputs."""

    def __init__(
        self, denoiser: nn.Module, found: Callable[..., Any], device: torch.device
    ) -> None:
        self._denoiser, self._found, self._device = denoiser, found, device
        self._capturer = Capturer(device)
        self.weights: Weights = Still()
        self._arrangement: int | None = None  # that the graphs hold for
        self._made: dict[Hashable, _Graph | None] = {}  # None: cannot be captured
        self._places: _Places | None = None  # of the weights, when the first was captured
        self._moved = False
        self.fallbacks = Fallbacks(denoiser, "eagerly, not as a CUDA graph")

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._is_plain():
            return self._found(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if graph := self._graph(leaves, spec):
            return graph.run(leaves)
        return self._capturer.run(lambda: self._found(*args, **kwargs))

    def drop(self) -> None:
        self._capturer.release()  # before what a graph has inside goes away
        self._made.clear()
        self._places = None

    def _is_plain(self) -> bool:
        """Whether a replay would do what the call asks for: it records no gradients, casts nothing
        by itself, and cannot be captured into a graph of the caller."""
        asked = asks_for(self._device.type)
        if asked is not None:
            self.fallbacks.tell(asked)
        return not (self._moved or asked or self._capturer.is_capturing())

    def _graph(self, leaves: list[Any], spec: pytree.TreeSpec) -> _Graph | None:
        signature = signature_of(leaves, spec)
        if signature is None:
            self.fallbacks.tell(INCOMPARABLE)
            return None
        arrangement = self.weights.arrangement()
        if self._made and arrangement != self._arrangement:
            self.drop()
        if arrangement is None:
            return None
        self._arrangement = arrangement
        if self._places and not self._places.hold():
            self.fallbacks.tell(MOVED)
            self._moved = True
            self.drop()
            return None
        # The memory format of the inputs decides which kernels run.
        key = (*signature, *map(_layout, tensors_of(leaves)))
        if key not in self._made and len(self._made) == MAX_GRAPHS:
            self.fallbacks.tell(f"its inputs vary more than the {MAX_GRAPHS} graphs that are kept")
        elif key not in self._made:
            self._made[key] = self._captured(leaves, spec)
        return self._made.get(key)

    def _captured(self, leaves: list[Any], spec: pytree.TreeSpec) -> _Graph | None:
        try:
            graph = _Graph(self._capturer, self.weights, self._found, leaves, spec, self._device)
        except NotCapturable as reason:
            self.fallbacks.tell(str(reason))
            return None
        self._places = self._places or _Places(self._denoiser)
        return graph


class _Graph:
    """One graph with the memory that it reads its inputs from and writes its outputs to.

    Raises:
        NotCapturable: a forward of these inputs.
    """

    def __init__(
        self,
        capturer: Capturer,
        weights: Weights,
        found: Callable[..., Any],
        leaves: list[Any],
        spec: pytree.TreeSpec,
        device: torch.device,
    ) -> None:
        constants, self._weights = without_tensors(leaves), weights

        def work() -> tuple[list[Any], pytree.TreeSpec]:
            args, kwargs = pytree.tree_unflatten(filled(constants, self._inputs), spec)
            return pytree.tree_flatten(found(*args, **kwargs))

        with _plain_tensors():
            self._inputs = [_buffer(tensor, device) for tensor in tensors_of(leaves)]
            self._fill(leaves)
            self._replay, (self._outputs, self._out_spec) = capturer.capture(work, weights)

    def run(self, leaves: list[Any]) -> Any:
        with _plain_tensors():
            self._fill(leaves)
            self._weights.begin()
            self._replay()
            outputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in self._outputs]
        return pytree.tree_unflatten(outputs, self._out_spec)

    def _fill(self, leaves: list[Any]) -> None:
        for buffer, tensor in zip(self._inputs, tensors_of(leaves), strict=True):
            buffer.copy_(tensor)


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Tensors made in inference mode could not be written to outside it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _buffer(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Memory like a tensor's, on the device: a graph cannot read a timestep on the host."""
    at = device if tensor.device.type == "cpu" else tensor.device
    return torch.empty_like(tensor, device=at, requires_grad=False)


def _layout(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides that matter: those of a dimension of one element say nothing."""
    sizes = zip(tensor.stride(), tensor.shape, strict=True)
    return tuple(stride for stride, size in sizes if size > 1)


class _Places:
    """Where a module's parts and weights are now. A graph has the addresses of the weights, and
    none of the Python: it would go on with layers that are no longer there."""

    def __init__(self, module: nn.Module) -> None:
        self._tables: list[Mapping[str, Any]] = []
        for part in module.modules():
            self._tables += filter(None, (part._modules, part._parameters, part._buffers))
        self._parts = self._current()  # held, so that no other part gets the id of one
        self._ids = list(map(id, self._parts))
        self._tensors = tensors_of(self._parts)
        self._addresses = list(map(torch.Tensor.data_ptr, self._tensors))

    def hold(self) -> bool:
        if list(map(id, self._current())) != self._ids:
            return False
        return list(map(torch.Tensor.data_ptr, self._tensors)) == self._addresses

    def _current(self) -> list[Any]:
        return [part for table in self._tables for part in table.values()]


CUDA_GRAPHS: tuple[Technique, ...] = (CudaGraph(), CudaGraph(compiled=True))
