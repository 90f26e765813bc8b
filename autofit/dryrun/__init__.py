"""Phase facts without running anything: no weights, no GPU, the true resolution.

The pipeline's own call runs on fake tensors, which have shapes and no memory. What was found before
is read from the cache; then neither torch nor diffusers is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from autofit.dryrun import memo
from autofit.dryrun.quiet import others_quiet
from autofit.dryrun.sources import source
from autofit.roofline import PhaseFacts
from autofit.spec import BadInput, Phase, Pipeline, Slot, Technique, Workload

__all__ = ["DryRun"]

# What changes the operations of each part. A placement only moves weights; execution and memory
# formats change how operations are merged and laid out, which these facts do not say.
_FRONT = (Slot.PRECISION, Slot.FEED_FORWARD, Slot.ATTENTION, Slot.GUIDANCE)
_DECODE = (Slot.PRECISION, Slot.DECODE)


class DryRun:
    """One model, to be asked for many workloads and techniques.

    ``model`` is a pipe (its weights are left alone), a built-in's name, a local folder or a Hub id;
    of the last two only small JSON files are read. ``dtype`` is for those without weights: else the
    built-in's own, or what the text encoders' configurations name.

    Raises:
        BadInput: no such model.
    """

    def __init__(self, model: Any, *, dtype: str | None = None) -> None:
        self._source = source(model, dtype)

    @cached_property
    def _ghost(self) -> Any:
        return self._source.ghost()

    @property
    def pipeline(self) -> Pipeline:
        """The facts of the pipe as it would be loaded."""

        def read() -> Pipeline:
            from autofit import probe
            from autofit.techniques.precision import HalfPrecision

            facts, dtype = probe.facts(self._ghost.pipe), self._ghost.dtype
            return HalfPrecision(dtype).facts(facts) if dtype in ("float16", "bfloat16") else facts

        return self._remembered(Pipeline, ("pipeline", self._source.key), read)

    def _remembered(
        self, kind: type[memo.Found], parts: tuple[Any, ...], make: Callable[[], memo.Found]
    ) -> memo.Found:
        def quietly() -> memo.Found:
            with others_quiet():
                return make()

        return memo.remembered(memo.digest(*parts), kind, quietly)

    def phases(
        self, workload: Workload, techniques: Sequence[Technique] = ()
    ) -> Mapping[Phase, PhaseFacts]:
        """Facts of each phase. Techniques of slots that change no operation are passed over.

        Raises:
            BadInput: a video, or a pipeline or a VAE that cannot be run without values.
        """
        if workload.frames > 1:
            raise BadInput(f"frames {workload.frames}: dry runs are of images; measure videos")
        front = self._front(workload, [t for t in techniques if t.slot in _FRONT])
        latents, decoding = front.latents, [t for t in techniques if t.slot in _DECODE]
        parts = ("decode", self._source.key, latents, [t.label for t in decoding])
        decode = self._remembered(PhaseFacts, parts, lambda: self._decode(latents, decoding))
        return {Phase.ENCODE: front.encode, Phase.STEP: front.step, Phase.DECODE: decode}

    def _front(self, workload: Workload, techniques: Sequence[Technique]) -> memo.Front:
        asked = (workload.width, workload.height, workload.batch, workload.passes)

        def run() -> memo.Front:
            from autofit.dryrun.front import run_front

            return run_front(self._ghost, workload, techniques)

        parts = ("front", self._source.key, asked, [t.label for t in techniques])
        return self._remembered(memo.Front, parts, run)

    def _decode(self, latents: memo.Latents, techniques: Sequence[Technique]) -> PhaseFacts:
        from autofit.dryrun.decode import run_decode

        return run_decode(self._ghost, latents, techniques)
