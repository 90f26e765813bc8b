"""A dry run made while the weights load: what the search starts from, at no cost in time."""

from __future__ import annotations

import logging
import threading

from autofit import cost, forecast
from autofit.dryrun import DryRun
from autofit.goals import Goal, fidelity_named, workload_for
from autofit.sampler import Task
from autofit.spec import AutofitError, Pipeline, Slot
from autofit.techniques.precision import PRECISIONS, HalfPrecision

_log = logging.getLogger(__name__)


class Foresight:
    """Begins at once, in a thread; not for a CPU, where only small models are tried. A model that
    cannot be run dry is searched without."""

    def __init__(self, model: str, goal: Goal, device: str, dtype: str | None) -> None:
        self._asked = model, goal, dtype
        self._dry: DryRun | None = None
        self._thread = threading.Thread(target=self._begin, daemon=True)
        if device.startswith("cuda"):
            self._thread.start()

    def wait(self) -> None:
        """Until it is over: what it found is remembered on disk, also for other processes."""
        if self._thread.is_alive():
            self._thread.join()

    def basis(self, task: Task) -> cost.Basis:
        """What the dry run says of each phase, for every precision among the plans."""
        self.wait()
        if self._dry is None:
            return {}
        precisions = {plan.at(Slot.PRECISION) for plan in task.plans}
        try:
            return forecast.basis(self._dry, task.pipeline, task.device, task.workload, precisions)
        except Exception as error:
            self._do_without(error)
            return {}

    def _begin(self) -> None:
        """What is found here is remembered by the dry run itself, and asked for again above."""
        model, goal, dtype = self._asked
        try:
            dry = DryRun(model, dtype=dtype)
            workload = workload_for(dry.pipeline, goal, model)
            dry.phases(workload)
            for precision in _precisions(dry.pipeline, goal):
                dry.phases(workload, [precision])
            self._dry = dry
        except (
            Exception
        ) as error:  # a dry run runs other people's code, on tensors they do not know
            self._do_without(error)

    def _do_without(self, error: Exception) -> None:
        known = isinstance(error, AutofitError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        _log.warning("searching without a dry run of %s: %s", self._asked[0], reason)


def _precisions(pipeline: Pipeline, goal: Goal) -> list[HalfPrecision]:
    """Those that plans will have, as far as it can be told before the device was probed."""
    if all(c.dtype != "float32" for c in pipeline.components):
        return []
    worst = fidelity_named(goal.fidelity)
    return [p for p in PRECISIONS if p.fidelity.rank <= worst.rank]
