"""A pipe with a profile applied: kept within the budget, leaner where memory runs out."""

from __future__ import annotations

import gc
import logging
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch

from autofit import anatomy, cost, host, host_budget, living, probe, prompts, techniques
from autofit.match import Match, needed_bytes
from autofit.probe import memory
from autofit.retrying import retrying
from autofit.spec import BadInput, Device, Pipeline, Plan, Profile
from autofit.trial import release
from autofit.trial.cap import Outside, capped, check_room
from autofit.trust import Trusted

NARROWER = 0.05  # of the budget
_LIVE: WeakSet[Applied] = WeakSet()
_LIVE_LOCK = threading.Lock()
_log = logging.getLogger(__name__)


class Applied:
    """A pipe with a profile applied: ``profile``, ``match`` (why it is trusted here), ``plan`` (the
    profile's, or the leaner one that it came to), ``revert()``, and a context manager."""

    profile: Profile
    match: Match
    plan: Plan
    _budget: _Budget

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
        self._pipe, self._target, self.device = pipe, device, torch.device(device)
        self._host_ram_bytes, self._cache_prompts = host_ram_bytes, cache_prompts
        facts, pipeline = probe.probe_device(device), probe.facts(pipe)
        limit_bytes = min(facts.host_limit_bytes, host_ram_bytes or facts.host_limit_bytes)
        hosted = replace(facts, host_limit_bytes=limit_bytes)
        self._leaner = deque(
            plan
            for plan in _leaner(self.profile, pipeline)
            if host_budget.why_not(plan, pipeline, hosted) is None
        )
        others = [one._budget.needed_bytes for one in applied_on(self.device)]
        beside_bytes = sum(others) - len(others) * cost.outside_bytes(facts)  # there once
        self._budget = _Budget(self.profile, facts, self.device, enforce, beside_bytes)
        self.lock = threading.RLock()
        self._steps = ExitStack()  # of the plan
        self._seen: list[Any] = []  # of the pipe, as the plan left it
        self.is_applied = True
        self._is_reverted = False
        with ExitStack() as stack:
            self._parked = stack.enter_context(ExitStack())
            self._parked.enter_context(parked(pipe))
            stack.enter_context(self._budget.kept())
            stack.callback(lambda: self._steps.close())
            self._steps.enter_context(self._running(self.plan))
            stack.enter_context(anatomy.attribute(pipe, "_autofit", self))
            stack.enter_context(retrying(pipe, self))
            stack.enter_context(living.pipe_guarded(pipe, self))
            self._undo = stack.pop_all()
        with _LIVE_LOCK:
            _LIVE.add(self)

    def revert(self) -> None:
        """Leave the pipe as it was found, but for what its owner changed meanwhile. A second call
        does nothing."""
        with self.lock:
            self.is_applied, self._is_reverted = False, True
            with _LIVE_LOCK:
                _LIVE.discard(self)
            self._undo.close()
            release(self.device)

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
        """Also where a step down was cut short, and no plan is applied. Parts that have changed
        since the last call get the plan anew."""
        if self._is_reverted:
            return  # while the call waited for its turn
        if not self.is_applied:
            if not self._leaner:
                name = type(self._pipe).__name__
                raise BadInput(f"{name}: none of its plans could be applied: call revert() on it")
            self.step_down("a step down was cut short")
        elif living.state(self._pipe) != self._seen:
            with self.suspended():
                pass
        self._budget.renew()

    def can_step_down(self) -> bool:
        return bool(self._leaner) and not self._is_reverted

    def step_down(self, error: str) -> None:
        """Change to the next leaner plan that can be applied, for good."""
        reason = error.splitlines()[0] if error else "no reason given"
        self.is_applied = False
        self._steps.close()
        release(self.device)
        self.plan = self._next()
        self.is_applied = True
        _log.warning("out of memory (%s): from now on %s", reason, self.plan.label)

    # What ``living`` asks

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The plan off, with the weights on the CPU, and applied anew on exit."""
        with self.lock:
            if not self.is_applied:
                yield
                return
            self._leaner.appendleft(self.plan)  # whatever happens, it is the next one
            self.is_applied = False
            self._steps.close()
            release(self.device)
            before = set(anatomy.modules(self._pipe).values())
            try:
                yield
            finally:
                if not before.issuperset(anatomy.modules(self._pipe).values()):
                    self._parked.enter_context(parked(self._pipe))
                self._resume()

    def _resume(self) -> None:
        wanted, name = self.plan, type(self._pipe).__name__
        try:
            self.plan = self._next()
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadInput(
                f"{name}: its profile cannot be applied to what it is now ({reason}): call revert()"
            ) from error
        self.is_applied = True
        if self.plan != wanted:
            _log.warning("%s has changed: from now on %s", name, self.plan.label)

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
                release(self.device)
                continue
            self._leaner.popleft()
            return plan

    @contextmanager
    def _running(self, plan: Plan) -> Iterator[None]:
        """A plan applied. What a prompt came to is kept for as long as that plan is."""
        with ExitStack() as undo:
            found = living.dtypes(self._pipe)
            plan = living.heard(plan, self._pipe)
            undo.enter_context(techniques.applied(plan, self._pipe, self._target))
            if self._cache_prompts:
                moves = "hooks_layers" in plan.placement.traits
                undo.enter_context(prompts.cached(self._pipe, weights_move=moves))
            undo.enter_context(living.parts_guarded(self._pipe, self, self.device, found))
            self._seen = living.state(self._pipe)
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
        self,
        profile: Profile,
        facts: Device,
        device: torch.device,
        enforce: bool,
        beside_bytes: int = 0,
    ) -> None:
        """``beside_bytes``: what other pipes of this process need by their profiles."""
        self._beside_bytes = beside_bytes
        self._outside = Outside.of(device, facts, None)
        self.needed_bytes = needed_bytes(profile.measured, facts)
        self._budget_bytes = min(profile.budget_bytes, facts.total_bytes) if enforce else None
        same = profile.on.device == facts.name
        self._aside_bytes = profile.measured.non_torch_bytes if same else cost.outside_bytes(facts)

    @contextmanager
    def kept(self) -> Iterator[None]:
        if self._outside.device.type == "cuda":
            self._check_room()
        cap = self._outside, self._budget_bytes, self._aside_bytes
        with capped(*cap, alone=False) as self._renew:
            yield

    def renew(self) -> None:
        """What is not the allocator's may have grown since the last call. Where NVML does not see
        this process, that cannot be told from what other processes have taken since."""
        device = self._outside.device
        if device.type == "cuda" and memory.own_bytes(device) is not None:
            self._renew()

    def _check_room(self) -> None:
        device = self._outside.device
        own_bytes = torch.cuda.memory_reserved(device) + self._outside.held_bytes()
        beside = ", with those of other pipes here," if self._beside_bytes else ""
        needed_bytes = self.needed_bytes + self._beside_bytes
        check_room(device, needed_bytes, own_bytes, f"the plan{beside}")


def applied_on(device: torch.device) -> list[Applied]:
    """The profiles applied in this process. A pipe that is gone has none."""
    if _LIVE:
        gc.collect()
    with _LIVE_LOCK:
        found = list(_LIVE)
    return [one for one in found if _place(one.device) == _place(device)]


def _place(device: torch.device) -> tuple[str, int]:
    return device.type, device.index or 0


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
