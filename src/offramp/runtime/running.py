"""A batch under a plan, compacted at each gate.

Shapes: B rows handed in, n rows still here, C classes. What leaves is written to its place in the order of x; what
stays goes on in a smaller batch, by one gather per carried tensor and one synchronisation per gate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp.errors import BadData, BadInput, MemberUnavailable, OpenAgain
from offramp.networks import ambient
from offramp.networks.dependence import extra_inputs, known_inputs, unread_text
from offramp.networks.inputs import State, as_inputs, count_of, needed_by, require_inputs
from offramp.networks.network import LOGITS, SCORE, Network, Part
from offramp.plans.plan import Plan, choose
from offramp.plans.signature import INPUT
from offramp.runtime.measuring import Percentile
from offramp.runtime.outputs import DEADLINE, DEEPEST, END, GATE, UNAVAILABLE, Answers, Filling, Rows
from offramp.runtime.staleness import Watch

TURNS = 8  # batches after which an engine with copies of the weights has looked at all of the network


class Runner:
    """A network opened under a plan on one engine and device: immutable, thread-safe, callable.

    `runner(x)` -> Answers for a batch x [B, ...]; `runner.anytime(x)` yields every exit's Answers, shallow to deep.
    It computes in the precision of the plan: `torch.autocast` around a call does not count.

    It refuses with OpenAgain once the network was moved, cast, trained or re-assigned. A write through NumPy or in
    place through `.data` is noticed late, or not at all: `Watch` in staleness.py says which. An engine with copies of
    the weights answers as the network was when it was opened, so there a change of single modules of a model, not of
    the whole, of its ends or of an exit, may be noticed as late as the eighth batch. `check` looks at everything at
    once.
    """

    def __init__(
        self,
        network: Network,
        plan: Plan,
        parts: Sequence[Part],
        every: Sequence[Part],
        percentiles: Sequence[Percentile] | None,
        *,
        own_threads: bool = False,
    ) -> None:
        self.plan = plan
        self.chain = network.chain
        self.device = network.device()
        self._places, self._end = {name: at for at, name in enumerate(self.chain.exits)}, len(self.chain.exits) - 1
        self._mode = nullcontext if own_threads else torch.inference_mode  # where torch computes nothing
        self._settings = None if own_threads else ambient.settings()
        containers = [network, network.backbone, network.fronts, network.exits, network.gates]
        self._containers = Watch(containers, deep=False)
        modules = {part.step.name: part.modules for part in every}
        passed = {part.step.name: part.passes for part in parts}
        self._watches = {
            name: _watch(
                network, [each for node in (*passed.get(name, ()), name) for each in modules[node]], own_threads
            )
            for name in modules
        }
        self._parts = tuple(parts)
        self._every = tuple(every)
        # Whether a part runs elsewhere and may not answer: then rows keep the answer of the exit before.
        self._may_fail = any(getattr(module, "may_be_unavailable", False) for part in parts for module in part.modules)
        self._keeps = tuple(later(self._parts, place) for place in range(len(self._parts)))
        self._thresholds = {gate: np.asarray(values, np.float32) for gate, values in plan.thresholds.items()}
        self._percentiles = percentiles
        self._gather = _by_numpy if own_threads and self.device.type == "cpu" else _by_torch
        probe = plan.origin.probe if plan.origin else None
        self._free = {name for rung in network.rungs for name in rung.length}  # of any length
        self._shapes = {one.name: self._asked(one.name, one.shape) for one in probe.inputs} if probe else None
        self._known = known_inputs(network) if self._shapes is None else frozenset(self._shapes)
        self._classes = probe.classes if probe else 0
        self._needed = needed_by(network.rungs, every)

    def __call__(self, x: Any, *, deadline_ms: float | None = None) -> Answers:
        """Answers for x [B, ...] (a tensor or an array). Raises BadData, BadInput, OpenAgain.

        With a deadline, a segment starts only if its measured 95th percentile fits into what is left; the first
        exit is always computed; rows that ran out of time get the latest exit's answer, and no promise.
        """
        start = time.perf_counter()
        if deadline_ms is not None:
            if self._percentiles is None:
                raise BadInput("a deadline needs measured segments; open the network with time_on=some rows")
            if math.isnan(deadline_ms):
                raise BadInput("the deadline is NaN, expected milliseconds; give a number, or none")
        self._containers.check()
        batch = self._batch(x)
        until = None if deadline_ms is None else start + deadline_ms / 1e3
        with ambient.autocast_off(self.device.type), self._mode():
            answers = self._walk(batch, until)
        came_from = _device_of(x)
        return answers if came_from in (None, self.device) else answers.to(came_from)

    def check(self) -> None:
        """Raise OpenAgain when the network is not what it was when it was opened."""
        self._containers.check()
        for watch in self._watches.values():
            watch.check()

    def anytime(self, x: Any) -> Iterator[Answers]:
        """Each exit's answer for all rows, as it comes, shallow to deep; stop iterating to stop the work."""
        self._containers.check()
        state = self._batch(x)
        count = count_of(state)
        for place, part in enumerate(self._every):
            with ambient.autocast_off(self.device.type), torch.inference_mode():
                result = Filling(count, self.device, self.chain.exits, self._classes)
                if result.count:
                    self._call(part, state)
                    result.put(None, state[part.step.name + LOGITS], place, END)
            yield result.answers()

    def _batch(self, x: Any) -> State:
        if self._settings is not None and ambient.settings() != self._settings:
            raise OpenAgain(
                f"torch's float32 matmul precision or default type was changed after the network was opened: "
                f"{ambient.settings()}, and then {self._settings}; change it back, or open again"
            )
        batch = as_inputs(x, self.device)
        require_inputs(batch, self._needed)
        if INPUT not in batch and (extra := extra_inputs(batch, self._known)):
            raise BadData(unread_text(extra, list(batch), "the batch"))
        shapes = {name: self._asked(name, tuple(value.shape[1:])) for name, value in batch.items()}
        if self._shapes is not None and shapes != self._shapes:
            raise BadData(f"rows have shapes {shapes}, expected {self._shapes} as recorded; check the data")
        return batch

    def _asked(self, name: str, shape: tuple[int, ...]) -> tuple[int | None, ...]:
        """The shape of a row as far as it is given: of text [T, ...] of any length without T."""
        return (None, *shape[1:]) if name in self._free else shape

    def _walk(self, state: State, until: float | None) -> Answers:
        inputs, count = tuple(state), count_of(state)
        result = Filling(count, self.device, self.chain.exits, self._classes)
        rows: Rows = None
        latest: tuple[int, Tensor] | None = None  # place and logits of the exit computed last
        for number, part in enumerate(self._parts):
            if not count:
                break
            if until is not None and latest is not None and not self._fits(number, count, until):
                result.put(rows, latest[1], latest[0], DEADLINE)
                break
            name, place = part.step.name, self._places[part.step.name]
            try:
                self._call(part, state)
            except MemberUnavailable:
                if latest is None:  # nothing has answered yet
                    raise
                result.put(rows, latest[1], latest[0], UNAVAILABLE)
                break
            if part.step.last:
                result.put(rows, state[name + LOGITS], place, END if place == self._end else DEEPEST)
                break
            if (until is not None or self._may_fail) and part.step.exit:
                latest = place, state[name + LOGITS]
            stay = self._leave(result, rows, state, name, place) if part.step.gate else None
            state = {key: state[key] for name in self._keeps[number] for key in (inputs if name == INPUT else (name,))}
            if stay is None:
                continue
            count = len(stay)
            rows = stay if rows is None else rows[stay]
            if count:
                state = self._gather(state, stay)
                latest = latest and (latest[0], self._gather({name: latest[1]}, stay)[name])
        return result.answers()

    def _call(self, part: Part, state: State) -> None:
        try:
            part.call(state)
        finally:  # also when the call failed: a network that was cast fails with a worse message
            self._watches[part.step.name].glance()

    def _leave(self, result: Filling, rows: Rows, state: State, name: str, place: int) -> Rows:
        """Write what leaves here; return which of the rows stay (None: all of them).

        Decided on the host: bringing the scores there is the one synchronisation of this gate, and on a CPU NumPy
        is quicker than torch with so few numbers.
        """
        score, logits = state[name + SCORE].cpu().numpy(), state[name + LOGITS]
        successor = choose(score[:, None], self._thresholds[name])
        stay = successor.nonzero()[0]
        if len(stay):
            result.flag(rows, np.isnan(score))
        if len(stay) == len(score):
            return None
        if not len(stay):
            result.put(rows, logits, place, GATE)
            return stay
        gone = (successor == 0).nonzero()[0]
        result.put(gone if rows is None else rows[gone], self._gather({name: logits}, gone)[name], place, GATE)
        return stay

    def _fits(self, number: int, count: int, until: float) -> bool:
        assert self._percentiles is not None
        return time.perf_counter() + self._percentiles[number](count) / 1e3 <= until


def _device_of(x: Any) -> torch.device | None:
    """Where a batch lies: a tensor, or the first of several; None for arrays."""
    first = (
        next(iter(x.values() if isinstance(x, Mapping) else x), None) if isinstance(x, (Mapping, tuple, list)) else x
    )
    return first.device if isinstance(first, Tensor) else None


def _watch(network: Network, modules: Sequence[nn.Module], copied: bool) -> Watch:
    """Over all modules at every batch; in turns where an engine has copies, beside which the weights are cold."""
    if not copied:
        return Watch(modules, deep=False)
    ours = {*network.fronts.modules(), *network.exits.modules(), *network.gates.modules()}
    theirs = [each for each in modules if each not in ours and next(each.parameters(recurse=False), None) is not None]
    return Watch(
        modules, deep=False, turns=TURNS, always=[*filter(ours.__contains__, modules), *theirs[:1], *theirs[-1:]]
    )


def _by_torch(state: State, rows: np.ndarray[Any, np.dtype[np.int64]]) -> State:
    index = torch.from_numpy(rows).to(next(iter(state.values())).device, non_blocking=True)
    return {key: value.index_select(0, index) for key, value in state.items()}


def _by_numpy(state: State, rows: np.ndarray[Any, np.dtype[np.int64]]) -> State:
    """For engines with threads of their own: torch's wait for more work at full speed, and stand in their way."""
    return {key: torch.from_numpy(value.detach().numpy()[rows]) for key, value in state.items()}


def later(parts: Sequence[Part], place: int) -> tuple[str, ...]:
    """Names of the tensors that the parts after `place` read."""
    made: set[str] = set()
    needed: dict[str, None] = {}
    for part in parts[place + 1 :]:
        needed.update(dict.fromkeys(key for key in part.reads if key not in made))
        made.update(part.writes)
    return tuple(needed)
