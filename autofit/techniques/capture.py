"""All that touches CUDA where a graph is captured: streams, the pool, a capture that failed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, TypeVar

from autofit.lazy import pytree, torch

Result = TypeVar("Result")
_WAITS = "called a synchronizing CUDA operation"
# torch's allocators ask a graph whose capture failed whether it captures, to the end of the
# process (``_repaired``): it must not go away before.
_FAILED: list[torch.cuda.CUDAGraph] = []


class NotCapturable(Exception):
    """This work cannot become a CUDA graph."""


class Weights(Protocol):
    """Where the weights of a forward are, for its graphs."""

    def arrangement(self) -> int | None:
        """Graphs hold for one arrangement of the weights; None: there is none yet. May change
        it."""

    def begin(self) -> None:
        """Before a capture, and before each replay."""

    def capturing(self) -> AbstractContextManager[None]:
        """While the current stream is being captured."""


class Still:
    """Weights that stay where they are."""

    def arrangement(self) -> int:
        return 0

    def begin(self) -> None:
        pass

    def capturing(self) -> AbstractContextManager[None]:
        return nullcontext()


class Capturer:
    """Captures the graphs of one module, one after the other: they share the memory of one pool.

    That is safe because each replay copies its outputs out before the next one begins.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def is_capturing(self) -> bool:
        """Whether a graph of somebody else is being captured."""
        return torch.cuda.is_current_stream_capturing()

    def capture(
        self, work: Callable[[], Result], weights: Weights
    ) -> tuple[Callable[[], None], Result]:
        """Run ``work`` twice, then capture it; all in the memory of the graphs before, which need
        it no more than one at a time. Returns the replay, and what ``work`` returned in
        the capture: each replay writes the same tensors anew. ``weights.begin`` comes before it.

        Raises:
            NotCapturable: the reason; CUDA is usable after it.
        """
        self._stream = self._stream or torch.cuda.Stream(self._device)
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        torch.cuda.empty_cache()  # what one stream has cached is of no use to another
        try:
            # Puts the current stream back too: torch.cuda.graph does not where a capture fails.
            with torch.cuda.stream(self._stream):
                with self._shared(self._stream):
                    work()  # libraries load, blocks are compiled
                    with _waits_noted() as waits:
                        work()
                if waits:
                    raise NotCapturable(f"{waits[0]} waits for the device during a forward")
                weights.begin()
                graph, result = self._captured(work, weights, self._stream)
        finally:
            here.wait_stream(self._stream)
            torch.cuda.empty_cache()
        self._take_workspaces()
        self._graphs.append(graph)
        return graph.replay, result

    def run(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` as it is, in the memory of the graphs, where there are any: none of them
        runs meanwhile. Returns copies of its tensors, which the next replay does not touch."""
        if self._stream is None or not self._graphs:
            return work()
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream), self._shared(self._stream):
                result = work()
        finally:
            here.wait_stream(self._stream)
        copies: Result = pytree.tree_map_only(torch.Tensor, torch.clone, result)
        return copies

    @contextmanager
    def _shared(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """Inside, memory is taken from the pool of the graphs, as ``torch.cuda.use_mem_pool`` takes
        it from a pool that no graph has made."""
        if not self._graphs:
            yield
            return
        device, pool = stream.device.index, self._graphs[0].pool()
        with _own_workspaces():
            torch._C._cuda_beginAllocateCurrentThreadToPool(device, pool)
            try:
                yield
            finally:
                torch._C._cuda_endAllocateToPool(device, pool)
                torch._C._cuda_releasePool(device, pool)

    def _captured(
        self, work: Callable[[], Result], weights: Weights, stream: torch.cuda.Stream
    ) -> tuple[torch.cuda.CUDAGraph, Result]:
        graph = torch.cuda.CUDAGraph()
        pool = self._graphs[0].pool() if self._graphs else torch.cuda.graph_pool_handle()
        capture = torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local")
        ended: BaseException | None = None
        try:
            with _own_workspaces(), capture, weights.capturing():
                try:
                    result = work()
                except BaseException as error:
                    ended = error  # where the capture is invalid, its end raises another
                    raise
        except torch.OutOfMemoryError:  # says something about memory, not about the work
            raise
        except Exception as error:
            _repaired(graph, pool, stream)
            ended = ended or error
            if isinstance(ended, torch.OutOfMemoryError) or not isinstance(ended, Exception):
                raise ended from None
            line = str(ended).strip().splitlines() or [type(ended).__name__]
            raise NotCapturable(f"its capture failed: {line[0]}") from ended
        return graph, result

    def _take_workspaces(self) -> None:
        """Let cuBLAS and cuBLASLt have theirs again (``_own_workspaces``), which they keep for
        good: else they take them in the midst of whatever comes next, from its pool."""
        square = torch.ones(16, 16, device=self._device)
        torch.addmm(square, square, square)
        torch.nn.functional.linear(square, square, square[0])

    def release(self) -> None:
        """Drop all graphs, and their memory."""
        if self._graphs:
            torch.cuda.synchronize(self._device)  # one may be running
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        self._stream = None


@contextmanager
def _waits_noted() -> Iterator[list[str]]:
    """Note where the work inside makes the host wait for the device, which no capture survives.

    By warnings: the mode is the process's, and an error would hit other threads too.
    """
    places: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    places += [f"{w.filename}:{w.lineno}" for w in noted if _WAITS in str(w.message)]


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """Let a capture take cuBLAS' workspace from its pool, and give it back there.

    Else the graph has the address of memory that anybody may free, or the pool never comes free.
    torch.compile's own CUDA graphs do the same.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def _repaired(
    graph: torch.cuda.CUDAGraph, pool: tuple[int, int], stream: torch.cuda.Stream
) -> None:
    """Undo what a failed capture leaves. Before 2.12 torch forgets to end the allocation to the
    pool (pytorch/pytorch#180395), after which memory can be neither freed nor pinned as before."""
    device = stream.device.index
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:
        pass  # torch has done it
    else:
        torch._C._cuda_releasePool(device, pool)
        _FAILED.append(graph)
    # The generator of random numbers thinks that it is in a capture until one ends well.
    with torch.cuda.graph(torch.cuda.CUDAGraph(), None, stream, capture_error_mode="thread_local"):
        torch.zeros(1, device=stream.device).add_(1)
