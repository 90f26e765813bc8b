"""How the denoiser's Python runs: replaced by a recorded graph, or compiled block by block."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import platformdirs

from autofit import anatomy, fallbacks
from autofit.fallbacks import Fallbacks
from autofit.lazy import nn, pytree, torch
from autofit.spec import (
    BadInput,
    Device,
    Effect,
    Fidelity,
    Phase,
    Pipeline,
    Slot,
    Technique,
    Workload,
)

MAX_TRACES = 4  # each costs a traced forward; inputs that vary more than this run eagerly
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# A UNet's blocks have several widths, each compiled for a batch of one, for more, and for other
# image sizes: more than torch's limit of 8, past which a whole graph is an error.
RECOMPILE_LIMIT = 64
# torch's own: the folder of all that it compiles, and of Triton's kernels, else in the first
CACHE_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
TRITON_CAPABILITY = (7, 0)  # below it torch.compile raises GPUTooOldForTriton
INCOMPARABLE = "an argument cannot be compared with that of the next call"
_TENSOR = object()  # stands for a tensor where constants are listed


@dataclass(frozen=True)
class TracedDenoiser(Technique):
    """Record the denoiser with ``torch.jit.trace`` and replay the graph: no Python in a step.

    A trace holds for one signature of the inputs and is made at the first call with it. What is not
    traced runs as it did, and is logged and told by ``fallbacks``.
    """

    name: ClassVar[str] = "traced"
    slot: ClassVar[Slot] = Slot.EXECUTION
    fidelity: ClassVar[Fidelity] = Fidelity.NUMERIC
    hope: ClassVar[float] = 0.1  # a graph launches the same kernels with less
    # In tests/golden SDXL's set-up took 4.35 s where it took 1.30 s without.
    setup_s: ClassVar[float] = 3.0

    def effects(self, pipeline: Pipeline, workload: Workload) -> Mapping[Phase, Effect]:
        """On the hosts of two H100s a step of SD 1.5 at 512x512 took 0.3 of an eager one."""
        return {Phase.STEP: Effect(seconds=0.6, launches=0.3, busy=0.98)}

    def fallbacks(self, pipe: Any) -> tuple[str, ...]:
        return fallbacks.texts_of(anatomy.denoiser(pipe))

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        denoiser = anatomy.denoiser(pipe)
        traces = _Traces(denoiser, denoiser.forward)

        @functools.wraps(denoiser.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return traces.run(args, kwargs)

        forward.fallbacks = traces.fallbacks  # type: ignore[attr-defined]
        with anatomy.attribute(denoiser, "forward", forward):
            yield


class _Traces:
    """The traces of one denoiser, by the signature of the inputs."""

    def __init__(self, denoiser: nn.Module, found: Callable[..., Any]) -> None:
        self._denoiser = denoiser
        self._found = found
        self._made: dict[Hashable, tuple[Callable[..., Any], pytree.TreeSpec]] = {}
        self.fallbacks = Fallbacks(denoiser, "eagerly, not traced")

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        signature = signature_of(leaves, spec)
        if signature is None:
            self.fallbacks.tell(INCOMPARABLE)
            return self._found(*args, **kwargs)
        if signature not in self._made:
            if len(self._made) == MAX_TRACES:
                self.fallbacks.tell(f"its inputs vary more than the {MAX_TRACES} traces kept")
                return self._found(*args, **kwargs)
            self._made[signature] = self._trace(leaves, spec)
        traced, out_spec = self._made[signature]
        # Optimising the graph takes seconds to minutes at the second call, and gains nothing where
        # the kernels are what takes the time.
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            return pytree.tree_unflatten(traced(*tensors_of(leaves)), out_spec)

    def _trace(
        self, leaves: list[Any], spec: pytree.TreeSpec
    ) -> tuple[Callable[..., Any], pytree.TreeSpec]:
        constants = without_tensors(leaves)
        out_specs: list[pytree.TreeSpec] = []

        def on_tensors(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            args, kwargs = pytree.tree_unflatten(filled(constants, tensors), spec)
            out_leaves, out_spec = pytree.tree_flatten(self._found(*args, **kwargs))
            out_specs.append(out_spec)
            return tuple(out_leaves)

        with torch.no_grad(), _without_trace_warnings():
            traced = torch.jit.trace(
                _body(self._denoiser, on_tensors),
                tensors_of(leaves),
                check_trace=False,
                strict=False,
            )
        return traced, out_specs[-1]


def _body(denoiser: nn.Module, on_tensors: Callable[..., Any]) -> nn.Module:
    """What is traced. The denoiser is a submodule, so that the graph refers to its parameters (and
    follows them when they move) where it would else hold copies as constants."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.denoiser = denoiser

        def forward(self, *tensors: torch.Tensor) -> Any:
            return on_tensors(*tensors)

    return Body()


def tensors_of(leaves: list[Any]) -> tuple[torch.Tensor, ...]:
    return tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


def without_tensors(leaves: list[Any]) -> list[Any]:
    """The leaves with marks where tensors were, which ``filled`` replaces."""
    return [_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def filled(constants: list[Any], tensors: Iterable[torch.Tensor]) -> list[Any]:
    given = iter(tensors)
    return [next(given) if c is _TENSOR else c for c in constants]


def signature_of(leaves: list[Any], spec: pytree.TreeSpec) -> tuple[Hashable, ...] | None:
    """What of the inputs a recording holds for; None where a constant has no hash to know it by."""
    signature = (str(spec), *map(_described, leaves))
    try:
        hash(signature)
    except TypeError:
        return None
    return signature


def _described(leaf: Any) -> Hashable:
    """Not a tensor's values, but a constant's value."""
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return type(leaf), leaf


@contextmanager
def _without_trace_warnings() -> Iterator[None]:
    """Shapes become constants on purpose; ``torch.jit`` has been called deprecated since 2.5."""
    from torch.jit._trace import TracerWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracerWarning)
        warnings.filterwarnings("ignore", r"`torch\.jit\.trace", DeprecationWarning)
        yield


@dataclass(frozen=True)
class RegionalCompile(Technique):
    """Compile the denoiser's repeated blocks with ``torch.compile``: one compilation a block class.

    Unlike diffusers' ``compile_repeated_blocks`` it compiles what a block's forward does, not the
    hooks around it: those that stream weights may stand there.

    Raises:
        BadInput: a mode that torch.compile does not know.
    """

    name: ClassVar[str] = "regional_compile"
    slot: ClassVar[Slot] = Slot.EXECUTION
    fidelity: ClassVar[Fidelity] = Fidelity.NUMERIC
    hope: ClassVar[float] = 0.1  # a graph launches the same kernels with less
    # With the code in the cache: in tests/golden the set-up of SDXL's graph took 2.5 to 3.1 s with
    # compiled blocks and 1.6 s without. With an empty cache it took 10 s more, SD 1.5's 21 s.
    setup_s: ClassVar[float] = 1.2

    mode: str | None = None

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise BadInput(f"compile mode {self.mode!r}: unknown; take one of {', '.join(MODES)}")

    def why_not(self, pipeline: Pipeline, device: Device, workload: Workload) -> str | None:
        if not pipeline.repeated_blocks:
            return f"{pipeline.denoiser.cls} names no repeated blocks"
        return no_compiler(device)

    def effects(self, pipeline: Pipeline, workload: Workload) -> Mapping[Phase, Effect]:
        """In trials of ``scripts/record_trials.py`` on H100s, captured in a graph, SDXL took 0.9 to
        0.92 of its steps' time, SD 1.5 at 3840x2224, where these are attention, 0.97, and FLUX,
        whose sums and products between tensors become one kernel, 0.7."""
        busy = 0.88 if pipeline.denoiser.convolutional else 0.7
        return {Phase.STEP: Effect(seconds=0.72, activations=0.9, launches=0.45, busy=busy)}

    def fallbacks(self, pipe: Any) -> tuple[str, ...]:
        """Of the blocks that stream layer by layer: the others' code does all that they did."""
        return fallbacks.texts_of(anatomy.denoiser(pipe))

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        denoiser: Any = anatomy.denoiser(pipe)
        # Other modes tune the layers too, or capture all that runs.
        opens = self.mode in (None, "default")
        if not opens:  # torch's reset imports it while it walks through what that import adds to
            importlib.import_module("torch._inductor.cudagraph_trees")
        with ExitStack() as stack:
            stack.enter_context(_tensor_attributes_held(denoiser))
            stack.enter_context(compiling())
            for module in denoiser.modules():
                if type(module).__name__ in denoiser._repeated_blocks:
                    forward = torch.compile(module.forward, fullgraph=True, mode=self.mode)
                    forward.opens = opens  # type: ignore[attr-defined]
                    stack.enter_context(anatomy.attribute(module, "forward", forward))
            yield


@contextmanager
def compiling() -> Iterator[None]:
    """What torch compiles meanwhile is kept on disk, and forgotten by the process on exit.

    Compiled code stays with classes and functions, where the next plan would meet it: torch guards
    neither the preferred attention kernel nor hooks on layers, and where sizes or dtypes change it
    compiles other code than ``apply`` will. There is no public reset of a part; what the caller
    compiled is compiled anew when next called, which costs time and changes no result.
    """
    import torch._dynamo.config

    with ExitStack() as stack:
        stack.callback(torch.compiler.reset)
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT))
        stack.enter_context(COMPILED.kept())
        yield


class _Compiled:
    """Where torch keeps what it compiled: in autofit's cache folder, from run to run, unless the
    user has named another folder. Its own default is a temporary one.

    The variables are the process's: whoever enters first sets them, and whoever leaves last puts
    back what was found.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._undo = ExitStack()

    @contextmanager
    def kept(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._undo.enter_context(_environment_held(CACHE_VARIABLES))
                _name_cache_folder()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._undo.close()


COMPILED = _Compiled()


def _name_cache_folder() -> None:
    """torch writes its default into the variables as soon as it is asked for: that names nothing
    of the user's."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    default = Path(default_cache_dir()).absolute()
    named = {n: os.environ[n] for n in CACHE_VARIABLES if n in os.environ}
    own = [n for n, path in named.items() if not Path(path).is_relative_to(default)]
    if CACHE_VARIABLES[0] in own or (folder := _cache_folder()) is None:
        return
    for name in named.keys() - own:
        del os.environ[name]
    os.environ[CACHE_VARIABLES[0]] = str(folder)
    os.environ.setdefault(CACHE_VARIABLES[1], str(folder / "triton"))


def _cache_folder() -> Path | None:
    """In the folder where the device's probe is; None where it cannot be made."""
    home = os.environ.get("AUTOFIT_HOME")
    base = Path(home) / "cache" if home else Path(platformdirs.user_cache_dir("autofit"))
    folder = (base / "inductor").absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder


@contextmanager
def _environment_held(names: Iterable[str]) -> Iterator[None]:
    found = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in found.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _tensor_attributes_held(module: nn.Module) -> Iterator[None]:
    """torch.compile marks the parameters that it meets with attributes of its own."""
    found = [(tensor, dict(vars(tensor))) for _, _, tensor in anatomy.tensors(module)]
    try:
        yield
    finally:
        for tensor, attributes in found:
            vars(tensor).clear()
            vars(tensor).update(attributes)


def no_compiler(device: Device) -> str | None:
    if device.kind == "cpu":
        compilers: tuple[str, ...] = (os.environ.get("CXX", "g++"),)
    elif device.capability is not None and device.capability < TRITON_CAPABILITY:
        return f"Triton needs compute capability 7.0, which {device.name} has not"
    elif not device.is_at_hand:
        return None  # what its host has installed is not known, and torch for CUDA brings Triton
    elif importlib.util.find_spec("triton") is None:
        return "it needs triton on CUDA; install triton"
    else:
        compilers = (os.environ.get("CC", "gcc"), "gcc", "clang")  # triton builds its launchers
    if any(map(shutil.which, compilers)):
        return None
    return f"there is no {compilers[0]} for it on {device.name}; install one or set CC and CXX"


EXECUTIONS: tuple[Technique, ...] = (TracedDenoiser(), RegionalCompile())
