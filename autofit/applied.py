"""A pipe with a profile applied: kept within the budget, leaner where memory runs out."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from autofit import anatomy, cost, host, host_budget, probe, prompts, techniques
from autofit.match import Match, needed_bytes
from autofit.probe import memory
from autofit.retrying import retrying
from autofit.spec import BadInput, Device, NothingFits, Pipeline, Plan, Profile
from autofit.trial import release
from autofit.trial.cap import Outside, capped
from autofit.trust import Trusted
from autofit.units import format_bytes

NARROWER = 0.05  # of the budget
_log = logging.getLogger(__name__)


class Applied:
    """A pipe with a profile applied: ``profile``, ``match`` (why it is trusted here), ``plan`` (the
    profile's, or the leaner one that it came to), ``revert()``, and a context manager."""

    profile: Profile
    match: Match
    plan: Plan

    def __init__(
        self,
        pipe: Any,
        trusted: Trusted,
        device: str,
        *,
        enforce: bool = True,
        host_ram_bytes: int | None = None,
        cache_prompts: bool = True,
    ) -> None:
        """With ``enforce`` the allocator is capped: what this process holds stays within the
        budget, and a call that needs more runs out of memory, and goes on by a leaner plan.

        Raises:
            NothingFits: other processes hold so much of the card that the plan cannot run.
        """
        self.profile, self.match, self.plan = trusted.profile, trusted.match, trusted.profile.plan
        self._pipe, self._target, self._device = pipe, device, torch.device(device)
        self._host_ram_bytes, self._cache_prompts = host_ram_bytes, cache_prompts
        facts, pipeline = probe.probe_device(device), probe.facts(pipe)
        limit_bytes = min(facts.host_limit_bytes, host_ram_bytes or facts.host_limit_bytes)
        hosted = replace(facts, host_limit_bytes=limit_bytes)
        self._leaner = deque(
            plan
            for plan in _leaner(self.profile, pipeline)
            if host_budget.why_not(plan, pipeline, hosted) is None
        )
        self._budget = _Budget(self.profile, facts, self._device, enforce)
        self._steps = ExitStack()  # of the plan
        self._is_applied = True
        with ExitStack() as stack:
            stack.enter_context(parked(pipe))
            stack.enter_context(self._budget.kept())
            stack.callback(lambda: self._steps.close())
            self._steps.enter_context(self._running(self.plan))
            stack.enter_context(anatomy.attribute(pipe, "_autofit", self))
            stack.enter_context(retrying(pipe, self))
            self._undo = stack.pop_all()

    def revert(self) -> None:
        """Leave the pipe as it was found. A second call does nothing."""
        self._undo.close()
        release(self._device)

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.revert()

    # What ``retrying`` asks

    def before_call(self) -> None:
        """Also where a step down was cut short, and no plan is applied."""
        if not self._is_applied:
            if not self._leaner:
                name = type(self._pipe).__name__
                raise BadInput(f"{name}: none of its plans could be applied: call revert() on it")
            self.step_down("a step down was cut short")
        self._budget.renew()

    def can_step_down(self) -> bool:
        return bool(self._leaner)

    def step_down(self, error: str) -> None:
        """Change to the next leaner plan that can be applied, for good."""
        reason = error.splitlines()[0] if error else "no reason given"
        self._is_applied = False
        self._steps.close()
        release(self._device)
        self.plan = self._next()
        self._is_applied = True
        _log.warning("out of memory (%s): from now on %s", reason, self.plan.label)

    def _next(self) -> Plan:
        while True:
            plan = self._leaner[0]
            try:
                with host.granted(self._host_ram_bytes):
                    self._steps.enter_context(self._running(plan))
            except Exception:
                self._leaner.popleft()
                if not self._leaner:
                    raise
                release(self._device)
                continue
            self._leaner.popleft()
            return plan

    @contextmanager
    def _running(self, plan: Plan) -> Iterator[None]:
        """A plan applied. What a prompt came to is kept for as long as that plan is."""
        with ExitStack() as undo:
            undo.enter_context(techniques.applied(plan, self._pipe, self._target))
            if self._cache_prompts:
                moves = "hooks_layers" in plan.placement.traits
                undo.enter_context(prompts.cached(self._pipe, weights_move=moves))
            yield


def _leaner(profile: Profile, pipeline: Pipeline) -> Iterator[Plan]:
    """The profile's plan with somewhat fewer weights on the device, where it can do with fewer, for
    what is short is most often little. Then its ladder, and the last plan of it with the fewest."""
    plan = profile.plan
    narrower = cost.narrowed(plan, pipeline, int(NARROWER * profile.budget_bytes))
    if narrower is not None:
        yield narrower
    for rung in profile.ladder:
        plan = rung.plan
        yield plan
    if plan.placement.opened != plan.placement:
        yield cost.placed(plan, plan.placement.opened)


class _Budget:
    """What the process may hold, and whether the card has it."""

    def __init__(
        self, profile: Profile, facts: Device, device: torch.device, enforce: bool
    ) -> None:
        self._outside = Outside.of(device, facts, None)
        self._needed_bytes = needed_bytes(profile.measured, facts)
        self._budget_bytes = min(profile.budget_bytes, facts.total_bytes) if enforce else None
        same = profile.on.device == facts.name
        self._aside_bytes = profile.measured.non_torch_bytes if same else cost.outside_bytes(facts)

    @contextmanager
    def kept(self) -> Iterator[None]:
        if self._outside.device.type == "cuda":
            self._check_room()
        with capped(self._outside, self._budget_bytes, self._aside_bytes) as self._renew:
            yield

    def renew(self) -> None:
        """What is not the allocator's may have grown since the last call. Where NVML does not see
        this process, that cannot be told from what other processes have taken since."""
        device = self._outside.device
        if device.type == "cuda" and memory.own_bytes(device) is not None:
            self._renew()

    def _check_room(self) -> None:
        device = self._outside.device
        free_bytes = memory.free_bytes(device)
        own_bytes = torch.cuda.memory_reserved(device) + self._outside.held_bytes()
        if self._needed_bytes - own_bytes <= free_bytes:
            return
        needed, free = format_bytes(self._needed_bytes - own_bytes), format_bytes(free_bytes)
        raise NothingFits(
            f"{device} has {free} free and the plan needs {needed} more; others hold it"
            f" ({memory.holders_text(device)}): end them, or plan for a smaller budget",
            None,
        )


@contextmanager
def parked(pipe: Any) -> Iterator[None]:
    """The pipe's weights on the CPU inside, each back on its device on exit."""
    parts = anatomy.modules(pipe)
    found = {
        name: next((t.device for _, _, t in anatomy.tensors(module)), torch.device("cpu"))
        for name, module in parts.items()
    }
    with ExitStack() as back:  # each, also where another one fails
        for name, device in reversed(found.items()):
            back.callback(parts[name].to, device)
        for module in parts.values():
            module.to("cpu")
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        yield
