"""A batch under a plan, compacted at each gate.

Shapes: B rows handed in, n rows still here, C classes. What leaves is written to its place in the
order of x; what goes on does so in a smaller batch, by one gather per carried tensor and one
synchronisation per gate. Rows that meet again after a fork are put together in the order of x.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from numbers import Real
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn

from offramp.errors import BadData, InvalidArgument, MemberUnavailable, StaleRunner
from offramp.networks import ambient
from offramp.networks.dependence import extra_inputs, known_inputs, unread_text
from offramp.networks.inputs import State, as_inputs, count_of, needed_by, require_inputs
from offramp.networks.network import LOGITS, SCORE, EngineStage, Network
from offramp.networks.walking import with_defaults
from offramp.plans.plan import Plan, choose
from offramp.plans.schedule import Edge, Stage
from offramp.plans.signature import INPUT
from offramp.plans.topology import LEAVE
from offramp.plans.trace import WHY
from offramp.runtime.code_marks import code_marks, code_reads
from offramp.runtime.lean import CompiledPiece, LeanChain, Wanted, inputs_of, lean_chain
from offramp.runtime.measuring import Percentile
from offramp.runtime.merging import Group, Index, Latest, carried, merged
from offramp.runtime.one_graph import OneGraph
from offramp.runtime.outputs import DEADLINE, END, UNAVAILABLE, OutputBuffer, Outputs, RowNumbers
from offramp.runtime.staleness import ChangeDetector, Rounds, SettingsDetector

Waiting = dict[str, list[Group]]  # by the name of a stage the rows that wait for it


class Observed:
    """What became of rows in a run, beside their answers.

    Attributes:
        ran: by node which rows [B] it ran for.
        near: which rows [B] had a score within the float band of a threshold.
    """

    def __init__(self, count: int, names: Sequence[str], band: float) -> None:
        self.ran = {name: np.zeros(count, bool) for name in names}
        self.near = np.zeros(count, bool)
        self.band = band

    def ran_for(self, nodes: Sequence[str], rows: RowNumbers) -> None:
        """Note that some nodes run for rows; None for all."""
        for name in nodes:
            self.ran[name][slice(None) if rows is None else rows] = True

    def scored(self, scores: Tensor, thresholds: np.ndarray[Any, Any], rows: RowNumbers) -> None:
        """Note the scores [n] or [n, K - 1] by which rows are sent on."""
        table = scores.detach().float().cpu().numpy().reshape(len(scores), -1)
        close = np.zeros(len(table), bool)
        for limit in np.unique(thresholds):
            close |= (np.abs(table.astype(float) - float(limit)) <= self.band).any(1)
        where = slice(None) if rows is None else rows
        self.near[where] = self.near[where] | close


class Runner:
    """A network opened under a plan on one engine and device: immutable, thread-safe, callable.

    `runner(x)` -> Answers for a batch x [B, ...]; `runner.anytime(x)` yields every exit's Answers,
    shallow to deep. It computes in the precision of the plan: `torch.autocast` around a call does
    not count.

    It refuses with StaleRunner once the network was moved, cast, trained or re-assigned. A write
    through NumPy or in place through `.data` is noticed late, or not at all: `ChangeDetector` in
    staleness.py says which. An engine with copies of the weights answers as the network was when it
    was opened. There a few modules are looked at after each batch, so a change of single modules,
    not of the whole network, is noticed after `shares` batches at most. `check` looks at everything
    at once.
    """

    def __init__(
        self,
        network: Network,
        plan: Plan,
        engine_stages: Sequence[EngineStage],
        every: Sequence[EngineStage],
        percentiles: Sequence[Percentile] | None,
        *,
        own_threads: bool = False,
        one_graph: OneGraph | None = None,
        way: str = "in parts",
    ) -> None:
        """Take what was opened.

        Args:
            network: in eval mode.
            plan: what it is opened under.
            parts: the stages of the plan.
            every: the stages in which every exit runs, for `anytime`.
            percentiles: of the parts' milliseconds, for deadlines.
            own_threads: see `Engine.own_threads`.
            one_graph: the plan in one call, where the engine has it.
            way: how it runs and why, for print.
        """
        self.way = way
        self._quick: Callable[[Any], Outputs | None] | None = one_graph
        self.plan = plan
        self.topology = network.topology
        self.device = network.device()
        self._exit_indices = {name: at for at, name in enumerate(self.topology.exits)}
        # where torch computes nothing
        self._mode = nullcontext if own_threads else torch.inference_mode
        self._settings = None if own_threads else ambient.settings()
        self._network = ref(network)
        self._code = code_marks(network)
        reads = code_reads(network)
        self._computes_with = SettingsDetector(
            network.modules(), reads.names, reads.containers, reads.tensors
        )
        containers = [network, network.backbone, network.fronts, network.exits, network.gates]
        self._containers = ChangeDetector(containers, deep=False)
        # by node: an engine may have joined several in a part
        modules = dict[str, tuple[nn.Module, ...]]()
        nodes = dict[str, tuple[str, ...]]()  # by part
        for engine_stage in every:
            nodes[engine_stage.name] = engine_stage.stage.nodes
            modules.update(dict.fromkeys(engine_stage.stage.nodes, engine_stage.modules))
        for engine_stage in engine_stages:
            nodes[engine_stage.name] = engine_stage.stage.nodes
        self._detectors = dict[str, ChangeDetector]()
        for name, several in nodes.items():
            watched = [each for node in several for each in modules[node]]
            self._detectors[name] = ChangeDetector(watched, deep=False)
        self._engine_stages = tuple(engine_stages)
        self._every = tuple(every)
        # Whether a part runs elsewhere and may not answer: then rows keep the answer of the exit
        # before.
        self._may_fail = any(
            getattr(module, "may_be_unavailable", False)
            for engine_stage in engine_stages
            for module in engine_stage.modules
        )
        self._thresholds = {
            engine_stage.name: np.asarray(engine_stage.stage.thresholds, np.float32)
            for engine_stage in engine_stages
        }
        self._columns = {
            engine_stage.name: _some_columns(engine_stage.stage, network)
            for engine_stage in engine_stages
        }
        self._percentiles = percentiles
        if own_threads and self.device.type == "cpu":
            self._gather = _by_numpy
        else:
            self._gather = _by_torch
        probe = plan.origin.probe if plan.origin else None
        self._free = {name for member in network.members for name in member.length}  # of any length
        self._known: frozenset[str] | None
        self._shapes: dict[str, tuple[int | None, ...]] | None
        if probe:
            self._shapes = {one.name: self._asked(one.name, one.shape) for one in probe.inputs}
            self._known = frozenset(self._shapes)
        else:
            self._shapes = None
            self._known = known_inputs(network)
        self._classes = probe.classes if probe else 0
        self._needed = needed_by(network.members, every)
        self._rounds = Rounds([network]) if own_threads else None
        self._compiled = compiled_for([*engine_stages, *every])
        self._lean: LeanChain | None = None
        if own_threads and not self._may_fail and self._as_recorded():
            self._lean = lean_chain(self.topology, engine_stages)
        if self._lean is None or self._quick is None:
            self._quick = self._lean

    def _as_recorded(self) -> bool:
        """Whether the parts were compiled for rows of the recorded shapes."""
        if self._shapes is None or self._compiled is None:
            return True
        return all(
            self._shapes.get(name) == wanted.shape for name, wanted in self._compiled.items()
        )

    def __call__(self, x: Any, *, deadline_ms: float | None = None) -> Outputs:
        """Answers for x [B, ...] (a tensor or an array). Raises BadData, InvalidArgument,
        StaleRunner.

        With a deadline, a segment starts only if its measured 95th percentile fits into what is
        left; the first exit is always computed; rows that ran out of time get the latest exit's
        answer, and no promise.
        """
        if deadline_ms is None and self._quick is not None:
            answers = self._quickly(self._quick, x)
            if answers is not None:
                return answers
        start = time.perf_counter()
        if deadline_ms is not None:
            if self._percentiles is None:
                raise InvalidArgument(
                    "a deadline needs measured segments; open the network with timing_rows=some "
                    "rows"
                )
            _require_deadline(deadline_ms)
        if self._rounds is None:
            self._containers.check()
        batch = self._batch(x)
        until = None if deadline_ms is None else start + deadline_ms / 1e3
        with ambient.autocast_off(self.device.type), self._mode():
            answers = self._walk(batch, until)
        self._spot_check()
        came_from = _device_of(x)
        return answers if came_from in (None, self.device) else answers.to(came_from)

    @property
    def shares(self) -> int:
        """The batches after which every module has been looked at for changes: see `Rounds`."""
        return 1 if self._rounds is None else self._rounds.shares

    def takes(self, x: Any) -> bool:
        """Whether rows x [B, ...] are of the types and shapes that this was compiled for."""
        if self._compiled is None:
            return True
        batch = as_inputs(x, self.device)
        for name, wanted in self._compiled.items():
            if name in batch and not wanted.fits(batch[name].dtype, batch[name].shape[1:]):
                return False
        return True

    def __repr__(self) -> str:
        return f"Runner of {len(self._engine_stages)} stages, {self.way}"

    def _quickly(self, quick: Callable[[Any], Outputs | None], x: Any) -> Outputs | None:
        """The answers of one graph or of the loop on arrays.

        None where the Runner has to look, or to explain what is wrong.
        """
        try:
            answers = quick(x)
        except Exception:  # errors of runtimes share no class; walking says it in a sentence
            return None
        self._spot_check()
        return answers

    def _spot_check(self) -> None:
        """Look at some settings, and at some modules where an engine has copies of the weights."""
        self._computes_with.spot_check()
        if self._rounds is not None:
            self._rounds.spot_check()

    def observed(self, x: Any, band: float) -> tuple[Outputs, Observed]:
        """Answers for x, and which nodes ran for each row and whether one of its scores lay near a
        threshold.
        """
        self._containers.check()
        batch = self._batch(x)
        seen = Observed(count_of(batch), self.topology.names, band)
        with ambient.autocast_off(self.device.type), self._mode():
            return self._walk(batch, None, seen), seen

    def check(self) -> None:
        """Raise StaleRunner when the network, or its code, is not what it was when it was
        opened.
        """
        self.check_values()
        network = self._network()
        if network is not None and code_marks(network) != self._code:
            raise StaleRunner(
                "the code of the network was changed after it was opened; change it back, or open "
                "again"
            )

    def check_values(self) -> None:
        """Raise StaleRunner when weights, settings, or what the code reads are not what they were.

        Quicker than `check` by the marks of code, which are not made again.
        """
        self._containers.check()
        self._computes_with.check()
        for detector in self._detectors.values():
            detector.check()

    def anytime(self, x: Any) -> Iterator[Outputs]:
        """Each exit's answer for all rows, as it comes, shallow to deep; stop iterating to stop the
        work.

        Raises BadNetwork in a network with forks, where no path passes every exit.
        """
        self.topology.require_chain("anytime")
        self._spot_check()
        if self._rounds is None:
            self._containers.check()
        state = self._batch(x)
        count = count_of(state)
        for index, engine_stage in enumerate(self._every):
            with ambient.autocast_off(self.device.type), torch.inference_mode():
                result = OutputBuffer(count, self.device, self.topology.exits, self._classes)
                if result.count:
                    self._call(engine_stage, state)
                    result.put(None, state[engine_stage.name + LOGITS], index, END)
            yield result.answers()

    def _batch(self, x: Any) -> State:
        if self._settings is not None and ambient.settings() != self._settings:
            raise StaleRunner(
                f"torch's float32 matmul precision or default type was changed after the network "
                f"was opened: "
                f"{ambient.settings()}, and then {self._settings}; change it back, or open again"
            )
        batch = as_inputs(x, self.device)
        require_inputs(batch, self._needed)
        if INPUT not in batch and (extra := extra_inputs(batch, self._known)):
            raise BadData(unread_text(extra, list(batch), "the batch"))
        shapes = {name: self._asked(name, tuple(value.shape[1:])) for name, value in batch.items()}
        if self._shapes is not None and shapes != self._shapes:
            raise BadData(
                f"rows have shapes {shapes}, expected {self._shapes} as recorded; check the data"
            )
        return batch

    def _asked(self, name: str, shape: tuple[int, ...]) -> tuple[int | None, ...]:
        """The shape of a row as far as it is given: of text [T, ...] of any length without T."""
        return (None, *shape[1:]) if name in self._free else shape

    def _walk(self, batch: State, until: float | None, seen: Observed | None = None) -> Outputs:
        """The loop of the schedule: each stage runs on the rows that wait for it, which then wait
        for later ones.
        """
        count = count_of(batch)
        result = OutputBuffer(count, self.device, self.topology.exits, self._classes)
        inputs = tuple(batch)
        waiting: Waiting = {}
        if count:
            waiting[self._engine_stages[0].name] = [
                Group(None, with_defaults(self.topology, batch), count, None)
            ]
        for number, engine_stage in enumerate(self._engine_stages):
            groups = waiting.pop(engine_stage.name, None)
            if groups is None:  # a stage without rows is not called
                continue
            group = groups[0] if len(groups) == 1 else merged(groups, self._gather)
            if (
                until is not None
                and group.latest is not None
                and not self._fits(number, group.size, until)
            ):
                group = self._answered(result, group, DEADLINE)
                if not group.size:
                    continue
            stage = engine_stage.stage
            state = group.state
            if seen is not None:
                seen.ran_for(stage.nodes, group.rows)
            try:
                self._call(engine_stage, state)
            except MemberUnavailable:
                # nothing has answered yet
                if group.latest is None or (group.latest.places < 0).any():
                    raise
                self._answered(result, group, UNAVAILABLE)
                continue
            if (until is not None or self._may_fail) and stage.exit:
                places = np.full(group.size, self._exit_indices[stage.name])
                group = group._replace(latest=Latest(places, state[stage.name + LOGITS]))
            if not stage.gate:
                self._send(result, waiting, stage, stage.edges[0], group, inputs)
                continue
            successor, later = self._chosen(result, stage, group)
            if seen is not None:
                seen.scored(state[stage.name + SCORE], self._thresholds[stage.name], group.rows)
            two = len(stage.edges) == 2
            # all go the same way: batches of one wait for this
            if not len(later) or (two and len(later) == group.size):
                self._send(
                    result, waiting, stage, stage.edges[1 if len(later) else 0], group, inputs
                )
                continue
            for index, edge in enumerate(stage.edges):
                chosen = later if two and index else (successor == index).nonzero()[0]
                if len(chosen) == group.size:
                    self._send(result, waiting, stage, edge, group, inputs)
                    break
                if len(chosen):
                    self._send(result, waiting, stage, edge, group, inputs, chosen)
        return result.answers()

    def _chosen(self, result: OutputBuffer, stage: Stage, group: Group) -> tuple[Index, Index]:
        """Which edge [n] each row takes, and the positions of the rows that do not take the first
        one.

        Decided on the host: bringing the scores there is the one synchronisation of this gate, and
        on a CPU NumPy is quicker than torch with so few numbers.
        """
        scores = group.state[stage.name + SCORE].cpu().numpy()
        columns = self._columns[stage.name]
        if scores.ndim == 1:
            scores = scores[:, None]  # [n, 1]
        elif columns is not None:
            scores = scores[:, columns]  # [n, K - 1] of the ways that are open
        successor = choose(scores, self._thresholds[stage.name])
        later = successor.nonzero()[0]
        if len(later):  # a row whose score is NaN never takes the first way
            bad = np.isnan(scores)
            result.flag(group.rows, bad[:, 0] if bad.shape[1] == 1 else bad.any(1))
        return successor, later

    def _send(
        self,
        result: OutputBuffer,
        waiting: Waiting,
        stage: Stage,
        edge: Edge,
        group: Group,
        inputs: Sequence[str],
        chosen: Index | None = None,
    ) -> None:
        """Rows along an edge: their answers are written, or they wait for a later stage. chosen:
        None for all rows.
        """
        rows = group.rows
        if chosen is not None:
            rows = chosen if rows is None else rows[chosen]
        if edge.to == LEAVE:
            logits = group.state[stage.name + LOGITS]
            if chosen is not None:
                logits = self._gather({"": logits}, chosen)[""]
            result.put(rows, logits, self._exit_indices[stage.name], WHY.index(stage.why))
            return
        state = carried(group.state, edge.carries, inputs)
        latest = group.latest
        size = group.size
        if chosen is not None:
            state = self._gather(state, chosen)
            size = len(chosen)
            if latest is not None:
                latest = Latest(
                    latest.places[chosen], self._gather({"": latest.logits}, chosen)[""]
                )
        waiting.setdefault(edge.to, []).append(Group(rows, state, size, latest))

    def _answered(self, result: OutputBuffer, group: Group, why: int) -> Group:
        """Write the answers that rows have so far; the rows of the group that have none."""
        latest = group.latest
        assert latest is not None
        for index in np.unique(latest.places[latest.places >= 0]).tolist():
            here = (latest.places == index).nonzero()[0]
            if len(here) == group.size:
                result.put(group.rows, latest.logits, index, why)
            else:
                rows = here if group.rows is None else group.rows[here]
                result.put(rows, self._gather({"": latest.logits}, here)[""], index, why)
        rest = (latest.places < 0).nonzero()[0]
        if not len(rest):
            return Group(None, {}, 0, None)
        rows = rest if group.rows is None else group.rows[rest]
        return Group(rows, self._gather(group.state, rest), len(rest), None)

    def _call(self, engine_stage: EngineStage, state: State) -> None:
        if self._rounds is not None:
            engine_stage.call(state)
            return
        try:
            engine_stage.call(state)
        finally:  # also when the call failed: a network that was cast fails with a worse message
            self._detectors[engine_stage.name].spot_check()

    def _fits(self, number: int, count: int, until: float) -> bool:
        assert self._percentiles is not None
        return time.perf_counter() + self._percentiles[number](count) / 1e3 <= until


def _require_deadline(value: object) -> None:
    """Raise InvalidArgument unless a deadline is a number; infinity stands for none."""
    if not isinstance(value, Real) or isinstance(value, bool) or math.isnan(value):
        raise InvalidArgument(
            f"deadline_ms must be a number of milliseconds, got {value!r}; leave it out for no "
            f"deadline"
        )


def compiled_for(engine_stages: Sequence[EngineStage]) -> dict[str, Wanted] | None:
    """The types and shapes of the inputs that parts were compiled for; None where they take any."""
    found = dict[str, Wanted]()
    for engine_stage in engine_stages:
        for function in engine_stage.functions.values():
            if not isinstance(function, CompiledPiece):
                continue
            for reads in function.compiled_for()[:1]:
                found.update(inputs_of(reads))
    return found or None


def _device_of(x: Any) -> torch.device | None:
    """Where a batch lies: a tensor, or the first of several; None for arrays."""
    first = (
        next(iter(x.values() if isinstance(x, Mapping) else x), None)
        if isinstance(x, (Mapping, tuple, list))
        else x
    )
    return first.device if isinstance(first, Tensor) else None


def _by_torch(state: State, rows: np.ndarray[Any, np.dtype[np.int64]]) -> State:
    index = torch.from_numpy(rows).to(next(iter(state.values())).device, non_blocking=True)
    return {key: value.index_select(0, index) for key, value in state.items()}


def _by_numpy(state: State, rows: np.ndarray[Any, np.dtype[np.int64]]) -> State:
    """For engines with threads of their own: torch's wait for more work at full speed, and stand in
    their way.
    """
    return {key: torch.from_numpy(value.detach().numpy()[rows]) for key, value in state.items()}


def _some_columns(stage: Stage, network: Network) -> list[int] | None:
    """The columns of a gate's scores that a stage decides by; None where it is all of them."""
    if not stage.gate or len(stage.routes) == network.topology.routes(stage.name):
        return None
    return list(stage.routes)
