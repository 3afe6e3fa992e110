"""A batch under a plan, compacted at each gate: this is where a batch gets smaller.

Shapes: B rows in x, n rows that are still on their way, C classes, K edges of a stage.

Rows that leave are written to their position in x. The others go on in a smaller batch: one gather
per carried tensor, and one synchronisation with the device per gate. Rows that meet again after a
fork are put together in the order of x.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from numbers import Real
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn

from offramp.errors import (
    BadData,
    BadNetwork,
    InvalidArgument,
    MemberUnavailable,
    StaleRunner,
)
from offramp.networks import ambient
from offramp.networks.code_marks import code_marks, code_reads
from offramp.networks.dependence import extra_inputs, known_inputs, unread_text
from offramp.networks.inputs import State, as_inputs, count_of, needed_by, require_inputs
from offramp.networks.network import LOGITS, SCORE, EngineStage, Network
from offramp.networks.walking import with_defaults
from offramp.plans.plan import Plan, choose
from offramp.plans.replay import WHY
from offramp.plans.schedule import Edge, Stage
from offramp.plans.signature import INPUT, is_input
from offramp.plans.topology import LEAVE
from offramp.runtime.lean import (
    CompiledPiece,
    LeanChain,
    Wanted,
    expected,
    inputs_of,
    lean_chain,
    leaves,
    leaving,
    staying,
)
from offramp.runtime.measuring import Percentile
from offramp.runtime.merging import Group, Index, Latest, carried, merged
from offramp.runtime.one_graph import OneGraph
from offramp.runtime.outputs import (
    DEADLINE,
    END,
    UNAVAILABLE,
    Answers,
    OutputBuffer,
    Outputs,
    RowNumbers,
)
from offramp.runtime.staleness import ChangeDetector, Rounds, SettingsDetector
from offramp.runtime.threads import MeasuredThreads

STAGE_SAMPLES = 2  # tensors that are compared by content after each run of a stage

Waiting = dict[str, list[Group]]  # the rows that wait for each stage, by the stage's name


class Observed:
    """What happened to the rows of a run, in addition to their answers.

    Attributes:
        ran: for each node, the rows [B] that it ran for.
        near: the rows [B] with a score within the float band of a threshold.
    """

    def __init__(self, count: int, names: Sequence[str], band: float) -> None:
        self.ran = {name: np.zeros(count, bool) for name in names}
        self.near = np.zeros(count, bool)
        self.band = band

    def ran_for(self, nodes: Sequence[str], rows: RowNumbers) -> None:
        """Note that nodes run for some rows; None means all of them."""
        where = slice(None) if rows is None else rows
        for name in nodes:
            self.ran[name][where] = True

    def scored(self, scores: Tensor, thresholds: np.ndarray[Any, Any], rows: RowNumbers) -> None:
        """Note the scores [n] or [n, K - 1] that decide where rows go."""
        table = scores.detach().float().cpu().numpy().reshape(len(scores), -1)  # [n, K - 1]
        close = np.zeros(len(table), bool)
        for limit in np.unique(thresholds):
            close |= (np.abs(table.astype(float) - float(limit)) <= self.band).any(1)
        where = slice(None) if rows is None else rows
        self.near[where] = self.near[where] | close


class Runner:
    """A network opened under a plan on one engine and device: immutable, thread-safe, callable.

    `runner(x)` gives the Outputs of a batch x [B, ...]. `runner.anytime(x)` yields the Outputs of
    every exit, from the first to the last. It computes in the precision of the plan;
    `torch.autocast` around a call has no effect.

    It raises StaleRunner once the network was moved, cast, trained or re-assigned. A write through
    NumPy or in place through `.data` is noticed late, or not at all: `ChangeDetector` in
    staleness.py says which. An engine with copies of the weights answers as the network was when it
    was opened. With such an engine a few modules are looked at after each batch, so that a change
    of a single module is noticed after at most `check_period` batches. `check` looks at everything
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
        threads: MeasuredThreads | None = None,
        way: str = "in parts",
    ) -> None:
        """Called by `open`.

        Args:
            network: in eval mode.
            plan: what it is opened under.
            engine_stages: the stages of the plan.
            every: the stages in which every exit runs, for `anytime`.
            percentiles: of the stages' milliseconds, for deadlines.
            own_threads: see `Engine.own_threads`.
            one_graph: the whole plan in one call, if the engine has it.
            threads: chooses torch's threads for every stage; None leaves them as they are.
            way: how it runs and why, for print.
        """
        self.way = way
        self.plan = plan
        self.topology = network.topology
        self.device = network.device()
        self._exit_indices = {name: index for index, name in enumerate(self.topology.exits)}
        self._engine_stages = tuple(engine_stages)
        self._every = tuple(every)
        self._percentiles = percentiles
        self._threads = threads
        self._thresholds = dict[str, np.ndarray[Any, Any]]()
        self._columns = dict[str, list[int] | None]()
        self._limits = dict[str, float]()
        for engine_stage in engine_stages:
            stage = engine_stage.stage
            self._thresholds[stage.name] = np.asarray(stage.thresholds, np.float32)
            self._columns[stage.name] = _some_columns(stage, network)
            # Gates with one score a row, by which rows leave or go on.
            if stage.gate and expected(stage) and self._columns[stage.name] is None:
                limit = float(self._thresholds[stage.name][0])
                if limit < math.inf:
                    self._limits[stage.name] = limit
        # With a member that runs elsewhere, rows keep the answer of the exit before it.
        self._may_fail = any(map(_may_be_unavailable, engine_stages))

        # An engine with threads of its own does not compute in torch.
        self._mode = nullcontext if own_threads else torch.inference_mode
        on_arrays = own_threads and self.device.type == "cpu"
        self._gather = _by_numpy if on_arrays else _by_torch

        self._detect_changes(network, own_threads)
        self._expect_inputs(network)

        # Two fast paths for common batches: a loop on arrays, and one graph of the whole plan.
        # `_walk` takes all other batches.
        self._lean: LeanChain | None = None
        if own_threads and not self._may_fail and self._as_recorded():
            self._lean = lean_chain(self.topology, engine_stages)
        self._quick: Callable[[Any], Outputs | None] | None = self._lean
        if self._lean is not None and one_graph is not None:
            self._quick = one_graph

    def _detect_changes(self, network: Network, own_threads: bool) -> None:
        """Remember what the network is now, so that changes are noticed."""
        self._network = ref(network)
        self._settings = None if own_threads else ambient.settings()
        self._code = code_marks(network)
        reads = code_reads(network)
        self._computes_with = SettingsDetector(
            network.modules(), reads.names, reads.containers, reads.tensors
        )
        containers = [network, network.backbone, network.fronts, network.exits, network.gates]
        self._containers = ChangeDetector(containers, deep=False)
        self._rounds = Rounds([network], self._computes_with) if own_threads else None
        # By node the modules that run there. An engine may have joined several nodes in a stage.
        modules = dict[str, tuple[nn.Module, ...]]()
        for engine_stage in self._every:
            modules.update(dict.fromkeys(engine_stage.stage.nodes, engine_stage.modules))
        self._detectors = dict[str, ChangeDetector]()
        for engine_stage in (*self._every, *self._engine_stages):
            watched = list[nn.Module]()
            for node in engine_stage.stage.nodes:
                watched += modules[node]
            self._detectors[engine_stage.name] = ChangeDetector(
                watched, deep=False, samples=STAGE_SAMPLES
            )

    def _expect_inputs(self, network: Network) -> None:
        """Remember which inputs the network reads, of which shapes."""
        # Dimensions that follow the length of a text can have any size.
        self._free = set[str]()
        for member in network.members:
            self._free.update(member.length)
        self._known: frozenset[str] | None
        self._shapes: dict[str, tuple[int | None, ...]] | None
        probe = self.plan.origin.probe if self.plan.origin else None
        if probe:
            self._shapes = {}
            for recorded in probe.inputs:
                self._shapes[recorded.name] = self._required_shape(recorded.name, recorded.shape)
            self._known = frozenset(self._shapes)
            self._classes = probe.classes
        else:
            self._shapes = None
            self._known = known_inputs(network)
            self._classes = 0
        self._needed = needed_by(network.members, self._every)
        self._compiled = compiled_for([*self._engine_stages, *self._every])

    def _as_recorded(self) -> bool:
        """Whether the stages were compiled for rows of the recorded shapes."""
        if self._shapes is None or self._compiled is None:
            return True
        for name, wanted in self._compiled.items():
            if wanted.shape != self._shapes.get(name):
                return False
        return True

    def __call__(self, x: Any, *, deadline_ms: float | None = None) -> Outputs:
        """The Outputs of a batch.

        Args:
            x: [B, ...], a tensor, an array, or several by name.
            deadline_ms: milliseconds for this call. A stage starts only if its measured 95th
                percentile fits into what is left. The first exit is always computed. Rows that run
                out of time get the answer of the latest exit they passed, and no promise. At a fork
                rows without an answer take the quickest way if theirs does not fit.

        Raises:
            BadData: rows of another shape or type than those that were recorded.
            InvalidArgument: a deadline without `timing_rows` at `open`, or one that is no number.
            StaleRunner: the network has changed since it was opened.
        """
        if deadline_ms is None and self._quick is not None:
            answers = self._quickly(self._quick, x)
            if answers is not None:
                return answers
        start = time.perf_counter()
        if deadline_ms is not None:
            if self._percentiles is None:
                raise InvalidArgument(
                    "deadline_ms needs measured segments. Use open(..., timing_rows=x) with some "
                    "rows"
                )
            _require_deadline(deadline_ms)
        if self._rounds is None:
            self._containers.check()
        batch = self._batch(x)
        until = None
        if deadline_ms is not None:
            until = start + deadline_ms / 1e3
        with ambient.autocast_off(self.device.type), self._mode():
            answers = self._walk(batch, until)
        self._spot_check()
        # Outputs go to the device of x. Arrays have none, and get those of the network.
        device_of_x = _device_of(x)
        if device_of_x is None or device_of_x == self.device:
            return answers
        return answers.to(device_of_x)

    @property
    def check_period(self) -> int:
        """After how many batches every module has been checked for changes: see `Rounds`."""
        return 1 if self._rounds is None else self._rounds.shares

    def takes(self, x: Any) -> bool:
        """Whether this was compiled for rows x [B, ...] of these types and shapes."""
        if self._compiled is None:
            return True
        batch = as_inputs(x, self.device)
        for name, wanted in self._compiled.items():
            if name in batch and not wanted.fits(batch[name].dtype, batch[name].shape[1:]):
                return False
        return True

    def __repr__(self) -> str:
        threads = "" if self._threads is None else f"; {self._threads}"
        return f"Runner of {len(self._engine_stages)} stages, {self.way}{threads}"

    def _quickly(self, quick: Callable[[Any], Outputs | None], x: Any) -> Outputs | None:
        """The Outputs of one graph, or of the loop on arrays.

        None if the general way has to be taken: for unusual rows, and to explain what is wrong.
        """
        try:
            answers = quick(x)
        except Exception:  # Runtimes share no class of errors. `_walk` raises one with a message.
            return None
        self._spot_check()
        return answers

    def _spot_check(self) -> None:
        """Check some settings; or what is due in turn if the engine has copies of the weights."""
        if self._rounds is not None:
            self._rounds.spot_check()
        else:
            self._computes_with.spot_check()

    def observed(self, x: Any, band: float) -> tuple[Outputs, Observed]:
        """The Outputs of x; and for each row which nodes ran, and whether a score was within `band`
        of a threshold.
        """
        self._containers.check()
        batch = self._batch(x)
        seen = Observed(count_of(batch), self.topology.names, band)
        with ambient.autocast_off(self.device.type), self._mode():
            return self._walk(batch, None, seen), seen

    def check(self) -> None:
        """Raise StaleRunner if the network or its code has changed since it was opened."""
        self.check_values()
        network = self._network()
        if network is not None and code_marks(network) != self._code:
            raise StaleRunner(
                "the code of the network was changed after it was opened; change it back, or "
                "open again"
            )

    def check_values(self) -> None:
        """Raise StaleRunner if weights, settings, or values that the code reads have changed.

        Faster than `check`, which also compares the code itself.
        """
        self._containers.check()
        self._computes_with.check()
        for detector in self._detectors.values():
            detector.check()

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What runs, in order; an engine may have joined stages of the plan's schedule."""
        return tuple(engine_stage.stage for engine_stage in self._engine_stages)

    def enter(self, x: Any, first: int = 0) -> Group:
        """A batch as a group of rows that wait for the first of `stages`, for use with `advance`.

        Args:
            x: [B, ...], as for a call.
            first: the number of its first row. Groups that may meet need different numbers.

        Raises:
            BadData: rows of another shape or type than those that were recorded.
            StaleRunner: the network has changed since it was opened.
        """
        if self._rounds is None:
            self._containers.check()
        batch = self._batch(x)
        count = count_of(batch)
        state = with_defaults(self.topology, batch)
        return Group(np.arange(first, first + count), dict(state), count, None)

    def advance(
        self, name: str, groups: Sequence[Group], answers: Answers, waiting: Waiting
    ) -> None:
        """Run one stage on the rows that wait for it: a step of what a call does for all stages.

        For whoever keeps the queues: a server that runs rows of many requests together, or a
        network whose stages run on two machines. Deadlines and members that do not answer belong to
        a call; here MemberUnavailable is raised.

        Args:
            name: of one of `stages`.
            groups: rows from `enter` or an earlier `advance`, at least one. They run as one batch.
            answers: takes the rows that leave.
            waiting: takes the rows that go on, by the name of the stage that they wait for.

        Raises:
            StaleRunner: the network has changed since it was opened.
        """
        (engine_stage,) = (one for one in self._engine_stages if one.name == name)
        with ambient.autocast_off(self.device.type), self._mode():
            group = merged(groups, self._gather)
            group = group._replace(state=dict(group.state))  # the caller's groups stay as they are
            self._call(engine_stage, group.state, group.size)
            inputs = [name for name in group.state if is_input(name)]
            self._divide(answers, waiting, engine_stage.stage, group, inputs)
        self._spot_check()

    def anytime(self, x: Any) -> Iterator[Outputs]:
        """The Outputs of each exit for all rows, from the first to the last. Stop iterating to stop
        the work.

        With forks, all rows take every path in turn, the cheap ways first, and every exit on it
        answers. Paths share what they have in common.

        Raises:
            BadNetwork: the network has more than sixteen paths.
        """
        if self.topology.has_many_paths:
            raise BadNetwork(
                "anytime takes each path in turn, at most sixteen, and this network has more. Use "
                "a deadline: runner(x, deadline_ms=...)"
            )
        self._spot_check()
        if self._rounds is None:
            self._containers.check()
        state = self._batch(x)
        count = count_of(state)
        if not self.topology.is_chain:
            yield from self._along_paths(state, count)
            return
        classes = self._classes_for(state, count)
        for index, engine_stage in enumerate(self._every):
            with ambient.autocast_off(self.device.type), torch.inference_mode():
                result = OutputBuffer(count, self.device, self.topology.exits, classes)
                if result.count:
                    self._call(engine_stage, state, count)
                    result.put(None, state[engine_stage.name + LOGITS], index, END)
            yield result.answers()

    def _along_paths(self, batch: State, count: int) -> Iterator[Outputs]:
        """`anytime` in a network with forks: a walk over the tree of paths, depth first."""
        by_name = {engine_stage.name: engine_stage for engine_stage in self._every}
        inputs = tuple(batch)
        classes = self._classes_for(batch, count)
        waiting = [(self._every[0], with_defaults(self.topology, batch))]
        while waiting:
            engine_stage, before = waiting.pop()
            stage = engine_stage.stage
            result = OutputBuffer(count, self.device, self.topology.exits, classes)
            with ambient.autocast_off(self.device.type), torch.inference_mode():
                state = dict(before)  # other paths continue from the same tensors
                if count:
                    self._call(engine_stage, state, count)
                    if stage.leaves:
                        index = self._exit_indices[stage.name]
                        result.put(None, state[stage.name + LOGITS], index, END)
                # The cheap ways are named first, and the last one put here is taken first.
                for edge in reversed(stage.edges):
                    if edge.to != LEAVE:
                        onward = carried(state, edge.carries, inputs) if count else state
                        waiting.append((by_name[edge.to], onward))
            if stage.leaves:
                yield result.answers()

    def _batch(self, x: Any) -> State:
        if self._settings is not None and ambient.settings() != self._settings:
            raise StaleRunner(
                "torch's float32 matmul precision or default type has changed since the network "
                f"was opened: it is {ambient.settings()}, and was {self._settings}. Change it "
                "back, or open again"
            )
        batch = as_inputs(x, self.device)
        require_inputs(batch, self._needed)
        if INPUT not in batch:  # several inputs by name
            extra = extra_inputs(batch, self._known)
            if extra:
                raise BadData(unread_text(extra, list(batch), "the batch"))
        if self._shapes is not None:
            shapes = dict[str, tuple[int | None, ...]]()
            for name, value in batch.items():
                shapes[name] = self._required_shape(name, tuple(value.shape[1:]))
            if shapes != self._shapes:
                raise BadData(f"rows must have the recorded shapes {self._shapes}, got {shapes}")
        return batch

    def _required_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int | None, ...]:
        """The shape that rows must have; None for the length of a text, which is free."""
        if name in self._free:
            return (None, *shape[1:])
        return shape

    def _classes_for(self, batch: State, count: int) -> int:
        """The number of classes C for the answers [0, C] of an empty batch.

        A plan that was made by hand does not know it. Then one row of zeros is run, once.

        Args:
            batch: the inputs by name, [B, ...] each.
            count: B. If it is not 0, the answers themselves have C, and nothing is run.
        """
        if count or self._classes:
            return self._classes
        one_row: State = {}
        for name, value in batch.items():
            one_row[name] = value.new_zeros(1, *value.shape[1:])
        with ambient.autocast_off(self.device.type), self._mode():
            self._classes = self._walk(one_row, None).logits.shape[1]
        return self._classes

    def _walk(self, batch: State, until: float | None, seen: Observed | None = None) -> Outputs:
        """Run the schedule: each stage in turn, on the rows that wait for it.

        `waiting` has the rows that go on, by the stage at which they wait. A stage takes the rows
        that wait for it, runs them, and sends each along an edge: to its answer, or to wait for a
        later stage. Stages are in an order in which all edges lead forward, so that one pass over
        them is enough.

        Args:
            batch: the inputs by name, [B, ...] each.
            until: when to be done, on the clock of time.perf_counter; None for no deadline.
            seen: takes notes on what happens to the rows.
        """
        count = count_of(batch)
        classes = self._classes_for(batch, count)
        result = OutputBuffer(count, self.device, self.topology.exits, classes)
        if not count:
            return result.answers()
        inputs = tuple(batch)
        everything = Group(None, with_defaults(self.topology, batch), count, None)
        waiting: Waiting = {self._engine_stages[0].name: [everything]}
        for number, engine_stage in enumerate(self._engine_stages):
            groups = waiting.pop(engine_stage.name, None)
            if groups is None:  # no row waits for this stage
                continue
            group = groups[0]
            if len(groups) > 1:  # arms of a fork that meet here
                group = merged(groups, self._gather)
            # A stage that would end too late does not run: rows get their latest answers.
            has_answers = until is not None and group.latest is not None
            if has_answers and not self._fits(number, group.size, until):
                group = self._answered(result, group, DEADLINE)
                if not group.size:
                    continue
            stage = engine_stage.stage
            if seen is not None:
                seen.ran_for(stage.nodes, group.rows)
            try:
                self._call(engine_stage, group.state, group.size, trial=until is None)
            except MemberUnavailable:
                if not _all_answered(group):
                    raise
                self._answered(result, group, UNAVAILABLE)
                continue
            # Keep the answers of this exit, in case a deadline or a failure needs them.
            if (until is not None or self._may_fail) and stage.exit:
                indices = np.full(group.size, self._exit_indices[stage.name])
                group = group._replace(latest=Latest(indices, group.state[stage.name + LOGITS]))
            if seen is not None and stage.gate:
                scores = group.state[stage.name + SCORE]
                seen.scored(scores, self._thresholds[stage.name], group.rows)
            self._divide(result, waiting, stage, group, inputs, until)
        return result.answers()

    def _divide(
        self,
        result: Answers,
        waiting: Waiting,
        stage: Stage,
        group: Group,
        inputs: Sequence[str],
        until: float | None = None,
    ) -> None:
        """Send each row along the edge that the gate chooses for it, or along the only one."""
        if not stage.gate:
            self._send(result, waiting, stage, stage.edges[0], group, inputs)
            return
        if stage.name in self._limits:
            self._leave_or_stay(result, waiting, stage, group, inputs)
            return
        successor, not_first = self._chosen(result, stage, group)
        if until is not None and isinstance(result, OutputBuffer):
            successor = self._in_time(result, stage, group, successor, until)
            not_first = successor.nonzero()[0]
        if not len(not_first):  # all rows take the first edge: common in small batches
            self._send(result, waiting, stage, stage.edges[0], group, inputs)
            return
        if len(stage.edges) == 2:  # rows leave or go on: `not_first` are those that go on
            if len(not_first) < group.size:
                first = (successor == 0).nonzero()[0]
                self._send(result, waiting, stage, stage.edges[0], group, inputs, first)
                self._send(result, waiting, stage, stage.edges[1], group, inputs, not_first)
            else:
                self._send(result, waiting, stage, stage.edges[1], group, inputs)
            return
        for index, edge in enumerate(stage.edges):
            chosen = (successor == index).nonzero()[0]
            if len(chosen) == group.size:
                self._send(result, waiting, stage, edge, group, inputs)
                return
            if len(chosen):
                self._send(result, waiting, stage, edge, group, inputs, chosen)

    def _leave_or_stay(
        self,
        result: Answers,
        waiting: Waiting,
        stage: Stage,
        group: Group,
        inputs: Sequence[str],
    ) -> None:
        """Send each row away or on by its only score, as `_chosen` does, in fewer operations.

        After a network that fills the cache, every call of NumPy takes ten microseconds. A single
        score is therefore compared as a Python float.
        """
        leave, onward = stage.edges
        limit = self._limits[stage.name]
        scores = group.state[stage.name + SCORE]  # [n]
        if group.size == 1:
            score = scores.item()
            if leaves(score, limit):
                self._send(result, waiting, stage, leave, group, inputs)
                return
            if score != score:  # NaN
                result.flag(group.rows, np.ones(1, bool))
            self._send(result, waiting, stage, onward, group, inputs)
            return
        values = scores.cpu().numpy()
        stay = staying(values, limit)
        if not len(stay):
            self._send(result, waiting, stage, leave, group, inputs)
            return
        nan = np.isnan(values)
        if nan.any():
            result.flag(group.rows, nan)
        if len(stay) == group.size:
            self._send(result, waiting, stage, onward, group, inputs)
            return
        away = leaving(values, limit)
        self._send(result, waiting, stage, leave, group, inputs, away)
        self._send(result, waiting, stage, onward, group, inputs, stay)

    def _chosen(self, result: Answers, stage: Stage, group: Group) -> tuple[Index, Index]:
        """The edge [n] that each row takes, and the positions of rows that do not take the first.

        This is decided on the host. Bringing the scores there is the one synchronisation of the
        gate, and on a CPU NumPy is faster than torch for so few numbers.
        """
        scores = group.state[stage.name + SCORE].cpu().numpy()
        columns = self._columns[stage.name]
        if scores.ndim == 1:
            scores = scores[:, None]  # [n] -> [n, 1]
        elif columns is not None:
            scores = scores[:, columns]  # [n, all routes] -> [n, open routes]
        successor = choose(scores, self._thresholds[stage.name])
        not_first = successor.nonzero()[0]
        if len(not_first):  # a row whose score is NaN never takes the first edge
            bad = np.isnan(scores)
            # [n, K - 1] -> [n]
            bad_rows = bad[:, 0] if bad.shape[1] == 1 else bad.any(1)
            result.flag(group.rows, bad_rows)
        return successor, not_first

    def _in_time(
        self, result: OutputBuffer, stage: Stage, group: Group, successor: Index, until: float
    ) -> Index:
        """The edge [n] that each row takes if time is short: a way that does not fit into the time
        that is left is replaced by the quickest one. Such rows are marked.

        A row that has an answer stays on its way: it gets that answer when time is up.
        """
        onward = [number for number, edge in enumerate(stage.edges) if edge.to != LEAVE]
        if len(onward) < 2 or _all_answered(group):
            return successor
        left = 1e3 * (until - time.perf_counter())
        counts = np.bincount(successor, minlength=len(stage.edges))  # rows of each edge
        ms = dict[int, float]()
        for number in onward:
            ms[number] = self._ms_to_answer(stage.edges[number].to, max(1, int(counts[number])))
        quickest = min(onward, key=lambda number: ms[number])
        spent = ms[quickest] if counts[quickest] else 0.0
        in_time = successor.copy()
        for number in onward:
            if number == quickest or not counts[number]:
                continue
            if spent + ms[number] <= left:
                spent += ms[number]
                continue
            late = (successor == number).nonzero()[0]
            in_time[late] = quickest
            result.mark_late(_numbers(group.rows, late))
        return in_time

    def _ms_to_answer(self, name: str, count: int) -> float:
        """Milliseconds until some exit has answered `count` rows that wait for a stage, along the
        quickest ways.
        """
        assert self._percentiles is not None
        quickest: dict[str, float] = {LEAVE: 0.0}
        # From the last stage backwards, so that all edges of a stage are known.
        numbered = [*enumerate(self._engine_stages)]
        for number, engine_stage in reversed(numbered):
            stage = engine_stage.stage
            ms = self._percentiles[number](count)
            if not stage.leaves:
                ms += min(quickest[edge.to] for edge in stage.edges)
            quickest[stage.name] = ms
        return quickest[name]

    def _send(
        self,
        result: Answers,
        waiting: Waiting,
        stage: Stage,
        edge: Edge,
        group: Group,
        inputs: Sequence[str],
        chosen: Index | None = None,
    ) -> None:
        """Send rows along an edge: to their answer, or to wait for a later stage.

        Args:
            result: takes the answers.
            waiting: takes the rows that go on.
            stage: where the rows are.
            edge: where they go.
            group: the rows of the stage.
            inputs: the names of the inputs.
            chosen: positions in the group of the rows that go this way; None for all of them.
        """
        rows = group.rows if chosen is None else _numbers(group.rows, chosen)
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
                logits = self._gather({"": latest.logits}, chosen)[""]
                latest = Latest(latest.exits[chosen], logits)
        waiting.setdefault(edge.to, []).append(Group(rows, state, size, latest))

    def _answered(self, result: OutputBuffer, group: Group, why: int) -> Group:
        """Write the latest answers of a group's rows. Returns the rows that have no answer yet."""
        latest = group.latest
        assert latest is not None
        # One `put` for each exit that has answered some of the rows.
        for index in np.unique(latest.exits[latest.exits >= 0]).tolist():
            here = (latest.exits == index).nonzero()[0]
            if len(here) == group.size:
                result.put(group.rows, latest.logits, index, why)
            else:
                logits = self._gather({"": latest.logits}, here)[""]
                result.put(_numbers(group.rows, here), logits, index, why)
        rest = (latest.exits < 0).nonzero()[0]
        if not len(rest):
            return Group(None, {}, 0, None)
        rows = _numbers(group.rows, rest)
        return Group(rows, self._gather(group.state, rest), len(rest), None)

    def _call(
        self, engine_stage: EngineStage, state: State, rows: int, *, trial: bool = True
    ) -> None:
        """Run a stage on some rows. With `trial`, a number of threads may be tried on them."""
        if self._rounds is not None:
            engine_stage.call(state)
            return
        try:
            if self._threads is None:
                engine_stage.call(state)
            else:
                compute = partial(engine_stage.call, state)
                self._threads(engine_stage.name, rows, compute, trial=trial)
        finally:  # also after a failure: a network that was cast fails with a worse message
            self._detectors[engine_stage.name].spot_check()

    def _fits(self, number: int, count: int, until: float | None) -> bool:
        """Whether a stage is likely to end in time with so many rows."""
        assert self._percentiles is not None
        assert until is not None
        return time.perf_counter() + self._percentiles[number](count) / 1e3 <= until


def _numbers(rows: RowNumbers, chosen: Index) -> Index:
    """The numbers in x of some rows of a group. `rows` are those of the group; None means all."""
    return chosen if rows is None else rows[chosen]


def _require_deadline(value: object) -> None:
    """Raise InvalidArgument unless a deadline is a number. Infinity means no deadline."""
    if not isinstance(value, Real) or isinstance(value, bool) or math.isnan(value):
        raise InvalidArgument(f"deadline_ms must be a number of milliseconds, got {value!r}")


def compiled_for(engine_stages: Sequence[EngineStage]) -> dict[str, Wanted] | None:
    """The types and shapes of the inputs that stages were compiled for; None if they take any."""
    inputs = dict[str, Wanted]()
    for engine_stage in engine_stages:
        for function in engine_stage.functions.values():
            if isinstance(function, CompiledPiece):
                for reads in function.compiled_for()[:1]:
                    inputs.update(inputs_of(reads))
    return inputs or None


def _may_be_unavailable(engine_stage: EngineStage) -> bool:
    """Whether a module of a stage runs elsewhere, and may not answer."""
    for module in engine_stage.modules:
        if getattr(module, "may_be_unavailable", False):
            return True
    return False


def _all_answered(group: Group) -> bool:
    """Whether every row of a group has an answer of some exit."""
    return group.latest is not None and bool((group.latest.exits >= 0).all())


def _device_of(x: Any) -> torch.device | None:
    """The device of a batch: that of a tensor, or of the first of several; None for arrays."""
    if isinstance(x, Mapping):
        x = next(iter(x.values()), None)
    elif isinstance(x, (tuple, list)):
        x = next(iter(x), None)
    return x.device if isinstance(x, Tensor) else None


def _by_torch(state: State, rows: Index) -> State:
    """Gather rows of every tensor: [n, ...] -> [m, ...]."""
    index = torch.from_numpy(rows).to(next(iter(state.values())).device, non_blocking=True)
    return {key: value.index_select(0, index) for key, value in state.items()}


def _by_numpy(state: State, rows: Index) -> State:
    """Gather rows for engines with threads of their own. Torch's threads spin while they wait for
    work, and would take the engine's cores.
    """
    return {key: torch.from_numpy(value.detach().numpy()[rows]) for key, value in state.items()}


def _some_columns(stage: Stage, network: Network) -> list[int] | None:
    """The columns of a gate's scores that a stage uses; None for all of them."""
    if not stage.gate or len(stage.routes) == network.topology.routes(stage.name):
        return None
    return list(stage.routes)
