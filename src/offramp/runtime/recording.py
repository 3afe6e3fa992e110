"""Runs all exits on all rows of a data set, and makes a Trace of the outputs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp._support.arguments import require_count, require_flag
from offramp._support.processes import Processes, here
from offramp._support.progress import track
from offramp._support.sentences import few
from offramp.data.rows import Batch, Rows, digests_of, fingerprint_of, proposing, rows_for
from offramp.errors import (
    BadData,
    BadNetwork,
    BetterExit,
    InvalidArgument,
    NoisyTimings,
    Notice,
    UntrainedExitWarning,
)
from offramp.networks.ambient import without_autocast
from offramp.networks.code_marks import code_marks, refuse_hidden
from offramp.networks.dependence import require_read
from offramp.networks.inputs import State, as_inputs, needed_by, require_inputs
from offramp.networks.network import LOGITS, SCORE, EngineStage, Network, as_network
from offramp.plans.columns import BACKBONE
from offramp.plans.evaluation import better_exit
from offramp.plans.header import Header
from offramp.plans.provenance import CHANGING, FORM, ORDINARY, Origin, largest_of
from offramp.plans.schedule import full_schedule
from offramp.plans.signature import Input
from offramp.plans.trace import LARGE_NOISE, Trace
from offramp.runtime.dialling import Dial, settings_of
from offramp.runtime.engine import Engine, engine_of, kind_of
from offramp.runtime.measuring import costs_of
from offramp.runtime.overhead import Noise, plain_costs, runner_costs
from offramp.runtime.probing import (
    ProbeRow,
    Sample,
    everything,
    outputs_of,
    probe_of,
    require_independent,
)

NOTICED = 10  # a Notice says when logits are larger than this many times `ORDINARY`
FEW = 16  # a gate with at most so many different scores says yes or no, whatever their size
OLDER = "digest/1"  # digests in the first form, a column that no trace keeps

Array = np.ndarray[Any, np.dtype[Any]]


@without_autocast()
def record(
    network: Network,
    data: object,
    *,
    batch_size: int = 64,
    keep: str = "logits",
    timed: bool = True,
    engine: str = "torch",
    keep_probe_rows: bool = False,
    settings: Sequence[float] | None = None,
    progress: bool = True,
) -> Trace:
    """Run every exit and every gate on every row once, and measure what each part costs.

    Some rows are run again in another batch and alone. A network whose answers depend on the batch,
    or are drawn at random, is refused. Autocast around the call does not count. Under torchrun or
    accelerate launch every process must call this: processes take whole batches in turn, so results
    match a single process bit for bit.

    Args:
        network: In eval mode.
        data: Whatever `offramp.rows` takes.
        batch_size: Rows of one call.
        keep: "logits", or "answers" to leave the logits [N, C] out of the trace.
        timed: Measure milliseconds over batch sizes 1 to 64 as well, and how noisy they are.
            Nothing else should run.
        engine: torch, onnxruntime or openvino, with options as in "torch:bf16". A plan made of this
            trace holds for this engine only.
        keep_probe_rows: Put up to sixteen of the rows themselves into the trace and its plans, so
            that every `open` compares the network on real rows. Otherwise a plan has only their
            digests and outputs.
        settings: Thresholds that all gates of a network with forks share, from the largest down.
            The network is run at each of them, and a plan is one of them. Without settings every
            path is recorded, at most sixteen.
        progress: Whether to show progress.

    Returns:
        The trace.

    Raises:
        BadData: No rows, labels out of range, wrong shapes, or rows that give NaN.
        BadNetwork: The network is in training mode, or a row's answer depends on its batch.
        MissingExtra: The engine is not installed.
    """
    if keep not in ("logits", "answers"):
        raise BadData(f"keep must be 'logits' or 'answers', got {keep!r}")
    batch_size = require_count("batch_size", batch_size)
    timed = require_flag("timed", timed)
    keep_probe_rows = require_flag("keep_probe_rows", keep_probe_rows)
    progress = require_flag("progress", progress)
    network = as_network(network)
    network.require_eval()
    refuse_hidden(network)
    untrained = network.untrained()
    if untrained:
        # A level of 3, because the decorator adds one.
        warnings.warn(_never_trained(untrained), UntrainedExitWarning, stacklevel=3)
    dial_settings = _dial_settings(network, settings)
    source = rows_for(network, data)
    device = network.device()
    schedule = full_schedule(network.topology)
    processes = here(device)
    if processes.count > 1:
        processes.require_same(network.fingerprint(), "network")
    chosen_engine, identity = engine_of(engine)
    engine_stages: Sequence[EngineStage] = chosen_engine.open(network, schedule, device)
    # Multiply-adds can only be counted in torch.
    counted = engine_stages
    if engine != "torch":
        counted = kind_of("torch")().open(network, schedule, device)
    origin = Origin(network.fingerprint(), identity, network.precision(), code=code_marks(network))

    # Run the batches. Every process takes its share of them.
    observed = _ObservedRows(network, engine_stages, origin)
    expected_rows = source.length if processes.count == 1 else None
    columns = _Columns(network, keep, chosen_engine.trained_on, expected_rows)
    total = None  # batches, for the bar
    if source.length is not None:
        total = math.ceil(source.length / (batch_size * processes.count))
    batches = track(
        source.batches(batch_size, processes.turn),
        what="recording",
        total=total,
        show=progress and processes.main,
    )
    dial = None
    if dial_settings is not None:
        dial = Dial(network, chosen_engine, dial_settings, origin.band)
    first = processes.agreed(
        lambda: _recorded(batches, columns, engine_stages, network, observed, source.name, dial)
    )

    # Put together what the processes have recorded.
    recorded = columns.joined(processes)
    if not recorded:
        raise BadData(f"data must have at least one row, got none in {source.name}")
    observed.join(processes)
    observed.origin = _with_steady_marks(observed.origin, network)
    largest = max(processes.gathered(columns.largest_logit))
    observed.origin = replace(observed.origin, largest_logit=largest)
    for sentence in _large(observed.origin, recorded, network):
        warnings.warn(sentence, Notice, stacklevel=3)

    # Measure the costs, and run some rows again. One process does that, while the others wait.
    def measured() -> tuple[dict[str, Array], float | None, Origin]:
        costs, noise = _measured(network, first, engine_stages, counted, chosen_engine, timed=timed)
        return costs, noise, observed.origin_with_probe(columns.classes, keep=keep_probe_rows)

    costs, noise, origin = processes.alone(measured)
    if noise is not None and noise > LARGE_NOISE:
        warnings.warn(_noisy(noise), NoisyTimings, stacklevel=3)
    trace = _trace(network, source, recorded | costs, origin, columns.classes)
    trace = replace(trace, header=replace(trace.header, noise=noise, settings=dial_settings or ()))
    if trace.labels is not None and dial_settings is None:
        right = trace.answers == trace.labels[:, None]  # [N, exits]
        notice = better_exit(right, trace.topology.exit_labels)
        if notice is not None:
            warnings.warn(notice, BetterExit, stacklevel=3)
    return trace


def _dial_settings(network: Network, settings: Sequence[float] | None) -> tuple[float, ...] | None:
    """The settings of a dial, checked; None without. Raises InvalidArgument, BadNetwork."""
    if settings is None:
        if network.topology.has_many_paths:
            raise BadNetwork(
                "this network has more than sixteen paths, and cannot be recorded on each of "
                "them. Use settings=[2.0, 1.0, 0.0]: thresholds that all of its gates share, "
                "among which plans are chosen"
            )
        return None
    values = settings_of(settings)
    if network.topology.is_chain:
        raise InvalidArgument(
            "settings must be None for a chain, because every exit of a chain is recorded"
        )
    return values


def _recorded(
    batches: Iterable[Batch],
    columns: _Columns,
    engine_stages: Sequence[EngineStage],
    network: Network,
    observed: _ObservedRows,
    what: str,
    dial: Dial | None,
) -> State:
    """Run batches and fill the columns. Returns the inputs of the first batch.

    Args:
        batches: of this process.
        columns: takes the outputs.
        engine_stages: with every exit and gate.
        network: in eval mode.
        observed: takes ranges of the inputs and some rows.
        what: name of the data, for messages.
        dial: runs the batches at its settings as well; None for none.
    """
    first: State = {}
    device = network.device()
    with proposing(network.fronts.values()):
        for batch in batches:
            x = as_inputs(batch.x, device)
            require_inputs(x, observed.needed)
            if not first:
                require_read(network, x, what)
            state = everything(network.topology, engine_stages, x)
            settings = {} if dial is None else dial.columns(x)
            columns.add(batch, state, settings)
            observed.add(batch, x, state, first=not first)
            if not first:
                first = x
    return first


class _ObservedRows:
    """Ranges of the inputs, and some rows for the probe.

    Attributes:
        origin: of the trace that is being made.
        needed: inputs that the network reads.
        inputs: types, shapes and ranges of the inputs so far, by name.
        sample: rows for the probe.
    """

    def __init__(
        self, network: Network, engine_stages: Sequence[EngineStage], origin: Origin
    ) -> None:
        self.network = network
        self.engine_stages = engine_stages
        self.origin = origin
        self.needed = needed_by(network.members, engine_stages)
        self.inputs: dict[str, Input] = {}
        self.sample = Sample()

    def add(self, batch: Batch, x: State, state: State, *, first: bool) -> None:
        """Take in a batch.

        Args:
            batch: rows as the data has them.
            x: their inputs, on the device of the network.
            state: all tensors that the network computed for them.
            first: whether this is the first batch. Some of its rows are then run again.

        Raises:
            BadNetwork: a row of the first batch depends on the other rows.
        """
        for name, value in as_inputs(batch.x, torch.device("cpu")).items():
            self._widen(name, Input.of(name, value.numpy()))
        self.sample.add(batch.digest, x, outputs_of(self.network.topology, state))
        if first:  # the end, where all are checked, may be hours away
            self._check(self.sample)

    def _widen(self, name: str, seen: Input) -> None:
        """Widen the range of an input."""
        if name in self.inputs:
            seen = self.inputs[name].widened(seen)
        self.inputs[name] = seen

    def join(self, processes: Processes) -> None:
        """Take in the rows and ranges of all processes."""
        samples = list[dict[int, ProbeRow]]()
        for inputs, sample_rows in processes.gathered((self.inputs, self.sample.rows)):
            for name, seen in inputs.items():
                self._widen(name, seen)
            samples.append(sample_rows)
        self.sample.joined(samples)

    def origin_with_probe(self, classes: int, *, keep: bool) -> Origin:
        """The origin of the trace. Raises BadNetwork if a row depends on the other rows."""
        self._check(self.sample)
        inputs = tuple(seen.settled() for seen in self.inputs.values())
        recorded = self.sample.recorded(self.network.topology, classes, keep=keep)
        probe = probe_of(self.network, inputs, self.engine_stages, recorded)
        return replace(self.origin, probe=probe)

    def _check(self, sample: Sample) -> None:
        groups: list[list[ProbeRow]] = [*sample.groups()]
        require_independent(self.network, self.engine_stages, groups, self.origin)


def _measured(
    network: Network,
    x: State,
    engine_stages: Sequence[EngineStage],
    counted: Sequence[EngineStage],
    engine: Engine,
    *,
    timed: bool,
) -> tuple[dict[str, Array], float | None]:
    """What each part costs on some rows, and how noisy the timings are (None if not timed)."""
    if not timed:
        return costs_of(engine_stages, x, timed=False, counted=counted), None
    noise = Noise(engine_stages, x)
    noise.time()
    costs = costs_of(engine_stages, x, timed=True, counted=counted)
    if network.topology.is_chain:  # with forks, a plan costs its segments, exits and gates alone
        costs |= runner_costs(network, engine_stages, x, own_threads=engine.own_threads)
    costs |= plain_costs(network, engine, x)
    noise.time()
    return costs, noise.share()


def _with_steady_marks(origin: Origin, network: Network) -> Origin:
    """An origin whose marks of code that recording changed say so. A Notice names them."""
    before = dict(origin.code)
    after = dict(code_marks(network))
    steady = list[tuple[str, str]]()
    changed = list[str]()
    for what in before | after:
        if after.get(what) == before.get(what):
            steady.append((what, before[what]))
        else:
            steady.append((what, CHANGING))
            changed.append(what)
    if not changed:
        return origin
    warnings.warn(
        f"{', '.join(changed)} changed attributes or globals that the code reads while it ran, "
        "such as a cache. "
        "This code will not be compared when the network is opened, only its outputs on the probe.",
        Notice,
        stacklevel=4,
    )
    return replace(origin, code=tuple(steady))


def _large(origin: Origin, columns: dict[str, Array], network: Network) -> list[str]:
    """Notices about logits and scores that are too large for the float band."""
    notices = list[str]()
    largest = origin.largest_logit
    if largest > NOTICED * ORDINARY:
        notices.append(
            f"logits reach {largest:.4g}, so thresholds count as uncertain within "
            f"{origin.band:.2g} of a score (the band is {origin.rounding:g} for logits up to "
            f"{ORDINARY:g}). If these are a few broken rows, leave them out; otherwise scale the "
            "logits down."
        )
    for label in network.topology.gate_labels:
        names = network.topology.score_columns(label)
        reached = max([largest_of(columns[name]) for name in names])
        is_large = reached > NOTICED * max(ORDINARY, largest)
        if is_large and len(np.unique(columns[names[0]])) > FEW:
            notices.append(
                f"scores of gate {label!r} reach {reached:.4g}, and thresholds count as uncertain "
                f"within {origin.band:.2g} of a score, which is too little for scores of this "
                "size. Scale them to the size of logits."
            )
    return notices


def _noisy(noise: float) -> str:
    return (
        f"the milliseconds are noisy: timings of the same call differ by {noise:.0%}. Prices in "
        "milliseconds may be far off. Record where nothing else runs, or use MACs"
    )


def _never_trained(names: Sequence[str]) -> str:
    return (
        f"exits never trained: {', '.join(names)}. Their answers mean nothing yet, and calibrate "
        "refuses this trace. Train them (offramp.fit, or any loop over net(x)), and record again"
    )


class _Growing:
    """A column that grows in place.

    A list of chunks that is joined at the end would hold a gigabyte of logits twice.

    Args:
        rows: the expected number, if it is known. A wrong number costs memory, nothing else.
    """

    def __init__(self, rows: int | None) -> None:
        self.rows = rows
        self.count = 0
        self.values: Array = np.empty(0)

    def add(self, values: Array) -> None:
        """Append rows [n, ...]."""
        end = self.count + len(values)
        if not self.count:
            self.values = np.empty((max(end, self.rows or 0), *values.shape[1:]), values.dtype)
        elif end > len(self.values):
            # `resize` writes zeros to the new memory at once, so it grows by a sixteenth only. The
            # system moves large blocks without a copy.
            self.values.resize((max(end, end + end // 16), *values.shape[1:]), refcheck=False)
        self.values[self.count : end] = values
        self.count = end

    def done(self) -> Array:
        """All rows."""
        if self.count < len(self.values):
            self.values.resize((self.count, *self.values.shape[1:]), refcheck=False)
        return self.values


class _Columns:
    """The columns of a trace, filled batch by batch.

    Args:
        network: that is recorded.
        keep: "logits" or "answers", as for `record`.
        training_rows: digests of rows that trained the engine; None for none.
        rows: the expected number; None if it is not known.
    """

    def __init__(
        self, network: Network, keep: str, training_rows: Array | None, rows: int | None
    ) -> None:
        self.topology = network.topology
        self.exits = network.topology.exit_labels
        self.keep = keep
        # Digests of rows that trained the network or the engine. Files of the first version have
        # digests in another form, `older`.
        self.older: Array | None = None
        trained_on = list[Array]()
        network_rows = network.training_rows()
        if network_rows is not None:
            trained_on += [network_rows.in_form(FORM), network_rows.rounded]
            self.older = network_rows.in_form(1)
        if training_rows is not None:
            trained_on.append(training_rows)
        self.trained_on = np.concatenate(trained_on) if trained_on else None
        self.rows = rows
        self.sizes: list[int] = []  # of the batches
        self.columns: dict[str, _Growing] = {}
        self.classes = 0
        self.largest_logit = 0.0  # of the exits that gates look at

    def add(self, batch: Batch, state: State, settings: Mapping[str, Array]) -> None:
        """Append the columns of a batch.

        Args:
            batch: rows as the data has them.
            state: all tensors that the network computed for them.
            settings: columns of a dial; empty without one.
        """
        columns: dict[str, Array] = {"row": batch.row, "digest": batch.digest, **settings}
        if self.older is not None and self.older.size:
            columns[OLDER] = digests_of(batch.x, form=1)
        self.classes = self._classes(state)
        if batch.y is not None:
            _check_labels(batch.y, batch.row, self.classes)
            columns["label"] = batch.y
        last = self.exits[-1]
        for name in self.exits:
            logits = state[name + LOGITS].float().cpu().numpy()  # [B, C]
            columns |= self._answer_columns(name, logits)
            if name != last:
                self.largest_logit = max(self.largest_logit, largest_of(logits))
        backbone_logits = self._backbone_logits(state)
        if backbone_logits is not None:
            columns |= self._answer_columns(BACKBONE, backbone_logits)
        _check_finite(state[last + LOGITS], batch.row, last)
        for label in self.topology.gate_labels:
            names = self.topology.score_columns(label)
            scores = state[label + SCORE].cpu().numpy().reshape(len(batch), -1)  # [B, K - 1]
            columns |= dict(zip(names, scores.T, strict=True))
        for name, column in columns.items():
            self.columns.setdefault(name, _Growing(self.rows)).add(column)
        self.sizes.append(len(batch))

    def _answer_columns(self, name: str, logits: Array) -> dict[str, Array]:
        """The columns of one exit with logits [B, C]."""
        columns = {f"answer/{name}": logits.argmax(1)}
        if self.keep == "logits":
            columns[f"logits/{name}"] = logits
        return columns

    def _backbone_logits(self, state: State) -> Array | None:
        """The logits [B, C] of the model itself, if its last exit answers otherwise than it.

        The last node then has an output like logits that is not the answer of its exit. In a cut
        model, `BACKBONE` is the name of the last exit, so there is no second column.
        """
        last = self.exits[-1]
        output = state.get(last)  # None with forks, where no node has a single answer
        logits = state[last + LOGITS]
        if output is None or output is logits or output.shape != logits.shape or last == BACKBONE:
            return None
        return output.float().cpu().numpy()

    def _classes(self, state: State) -> int:
        widths = {name: int(state[name + LOGITS].shape[1]) for name in self.exits}
        if len(set(widths.values())) > 1:
            raise BadNetwork(
                f"all exits must have the same number of classes, got {widths}. Check the members"
            )
        return widths[self.exits[-1]]

    def joined(self, processes: Processes) -> dict[str, Array]:
        """The columns over all rows. Processes took the batches in turn."""
        names = list[str]()
        for process_names in processes.gathered([*self.columns]):
            names = names or process_names  # a process without batches has no columns
        joined: dict[str, Array] = {}
        for name in names:  # one at a time, so that only one column of other processes is in memory
            column = self.columns[name].done() if name in self.columns else None
            if processes.count == 1:
                assert column is not None
                joined[name] = column
                continue
            batches = list[Array]()
            if column is not None:
                batches = np.split(column, np.cumsum(self.sizes)[:-1])
            joined[name] = np.concatenate(processes.woven(batches))
        older = joined.pop(OLDER, None)
        # Only once, because every look-up sorts all training rows.
        if self.trained_on is not None and joined:
            joined["learned"] = np.isin(joined["digest"], self.trained_on)
            if older is not None and self.older is not None:
                joined["learned"] |= np.isin(older, self.older)
        return joined


def _check_labels(y: Array, row: Array, classes: int) -> None:
    bad = np.flatnonzero((y < 0) | (y >= classes))
    if bad.size:
        raise BadData(
            f"labels must be from 0 to {classes - 1}, got {bad.size} others (row {row[bad[0]]} has "
            f"{y[bad[0]]}). Use the data set for which the network was trained"
        )


def _check_finite(logits: Tensor, row: Array, exit_: str) -> None:
    bad = np.flatnonzero(~logits.isfinite().all(1).cpu().numpy())  # [B, C] -> rows
    if bad.size:
        raise BadData(
            f"the answers of exit {exit_!r} are not finite for rows {few(row[bad], 10)}. Look for "
            "NaN or infinities in these rows and leave them out"
        )


def _trace(
    network: Network, source: Rows, columns: dict[str, Array], origin: Origin, classes: int
) -> Trace:
    header = Header(
        topology=network.topology,
        reference=network.topology.exits[-1],
        classes=classes,
        data=source.name,
        data_fingerprint=fingerprint_of(columns["digest"]),
        origin=origin,
        class_names=source.class_names,
        trained=not network.untrained(),
        scores={name: network.gate_of(name).score_range() for name in network.topology.gates},
    )
    return Trace(columns, header)
