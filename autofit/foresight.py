"""A dry run made while the weights load: what the search starts from, at no cost in time."""

from __future__ import annotations

import logging
import threading

from autofit import cost, forecast
from autofit.dryrun import DryRun
from autofit.goals import Goal, workload_for
from autofit.sampler import Task
from autofit.spec import AutofitError, Slot

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

    def basis(self, task: Task) -> cost.Basis:
        """What the dry run says of each phase, for every precision among the plans."""
        if self._thread.is_alive():
            self._thread.join()
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
            dry.phases(workload_for(dry.pipeline, goal, model))
            self._dry = dry
        except (
            Exception
        ) as error:  # a dry run runs other people's code, on tensors they do not know
            self._do_without(error)

    def _do_without(self, error: Exception) -> None:
        known = isinstance(error, AutofitError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        _log.warning("searching without a dry run of %s: %s", self._asked[0], reason)
