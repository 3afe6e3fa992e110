"""All exits on all rows -> Trace."""

from __future__ import annotations

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
from offramp.networks.dependence import require_read
from offramp.networks.inputs import State, as_inputs, needed_by, require_inputs
from offramp.networks.network import LOGITS, SCORE, EngineStage, Network, as_network
from offramp.plans.evaluation import better_exit
from offramp.plans.provenance import FORM, ORDINARY, Origin, largest_of
from offramp.plans.schedule import full_schedule
from offramp.plans.signature import Input
from offramp.plans.trace import BACKBONE, LARGE_NOISE, Header, Trace
from offramp.runtime.code_marks import code_marks, refuse_hidden
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

TOLD = 10  # times the logits for which the float band is meant, beyond which it is said
FEW = 16  # different scores of a gate that says yes or no, whatever their size
OLDER = "digest/1"  # a column that no trace keeps

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
        raise BadData(f"keep is {keep!r}, expected 'logits' or 'answers'")
    batch_size = require_count("batch_size", batch_size)
    timed = require_flag("timed", timed)
    keep_probe_rows = require_flag("keep_probe_rows", keep_probe_rows)
    progress = require_flag("progress", progress)
    network = as_network(network)
    network.require_eval()
    refuse_hidden(network)
    if untrained := network.untrained():
        # behind the decorator
        warnings.warn(_never_trained(untrained), UntrainedExitWarning, stacklevel=3)
    dial = None if settings is None else settings_of(settings)
    if dial is not None and network.topology.is_chain:
        raise InvalidArgument(
            "settings are of networks with forks; of a chain every exit is recorded"
        )
    if dial is None and network.topology.has_many_paths:
        raise BadNetwork(
            "this network has more than sixteen paths, which cannot all be recorded; give "
            "settings=[2.0, 1.0, 0.0], "
            "thresholds that all of its gates share, and plans are chosen among them"
        )
    source = rows_for(network, data)
    device = network.device()
    schedule = full_schedule(network.topology)
    processes = here(device)
    if processes.count > 1:
        processes.require_same(network.fingerprint(), "network")
    shelved, identity = engine_of(engine)
    engine_stages: Sequence[EngineStage] = shelved.open(network, schedule, device)
    counted: Sequence[EngineStage] = (
        engine_stages if engine == "torch" else kind_of("torch")().open(network, schedule, device)
    )
    origin = Origin(network.fingerprint(), identity, network.precision(), code=code_marks(network))
    looked = _Looked(network, engine_stages, origin)
    room = source.length if processes.count == 1 else None
    columns = _Columns(network, keep, shelved.trained_on, room)
    batches = source.batches(batch_size, processes.turn)
    if source.length is None:
        total = None
    else:
        total = -(-source.length // (batch_size * processes.count))
    shown = track(batches, what="recording", total=total, show=progress and processes.main)
    dialled = None if dial is None else Dial(network, shelved, dial, origin.band)
    first = processes.agreed(
        lambda: _recorded(shown, columns, engine_stages, network, looked, source.name, dialled)
    )
    found = columns.joined(processes)
    if not found:
        raise BadData(f"{source.name} has no rows, expected at least one; check the selection")
    looked.join(processes)
    looked.origin = _with_steady_marks(looked.origin, network)
    largest = max(processes.gathered(columns.largest_logit))
    looked.origin = replace(looked.origin, largest_logit=largest)
    for sentence in _large(looked.origin, found, network):
        warnings.warn(sentence, Notice, stacklevel=3)

    def measured() -> tuple[dict[str, Array], float | None, Origin]:
        costs, noise = _measured(network, first, engine_stages, counted, shelved, timed=timed)
        return costs, noise, looked.origin_with_probe(columns.classes, keep=keep_probe_rows)

    costs, noise, origin = processes.alone(measured)
    if noise is not None and noise > LARGE_NOISE:
        warnings.warn(_noisy(noise), NoisyTimings, stacklevel=3)
    trace = _trace(network, source, found | costs, origin, columns.classes)
    trace = replace(trace, header=replace(trace.header, noise=noise, settings=dial or ()))
    if trace.labels is not None and dial is None:
        said = better_exit(trace.answers == trace.labels[:, None], trace.topology.exit_labels)
        if said is not None:
            warnings.warn(said, BetterExit, stacklevel=3)
    return trace


def _recorded(
    batches: Iterable[Batch],
    columns: _Columns,
    engine_stages: Sequence[EngineStage],
    network: Network,
    looked: _Looked,
    what: str,
    dial: Dial | None,
) -> State:
    """Fill the columns; returns the first batch."""
    first: State = {}
    device = network.device()
    with proposing(network.fronts.values()):
        for batch in batches:
            x = as_inputs(batch.x, device)
            require_inputs(x, looked.needed)
            if not first:
                require_read(network, x, what)
            state = everything(network.topology, engine_stages, x)
            columns.add(batch, state, {} if dial is None else dial.columns(x))
            looked.add(batch, x, state, first=not first)
            first = first or x
    return first


class _Looked:
    """What is remembered of the rows beside their columns: ranges of the inputs, and some rows for
    the probe.
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
        """Look at a batch. Raises BadNetwork where rows of the first one depend on their
        batch-mates.
        """
        for name, value in as_inputs(batch.x, torch.device("cpu")).items():
            seen = Input.of(name, value.numpy())
            self.inputs[name] = self.inputs[name].widened(seen) if name in self.inputs else seen
        self.sample.add(batch.digest, x, outputs_of(self.network.topology, state))
        if first:  # and not only in the end, which may be hours away
            self._check(self.sample)

    def join(self, processes: Processes) -> None:
        """Take in what all processes have seen."""
        others = processes.gathered((self.inputs, self.sample.rows))
        for inputs, _ in others:
            for name, seen in inputs.items():
                self.inputs[name] = self.inputs[name].widened(seen) if name in self.inputs else seen
        self.sample.joined([rows_ for _, rows_ in others])

    def origin_with_probe(self, classes: int, *, keep: bool) -> Origin:
        """The origin of the trace. Raises BadNetwork as `add` does, of rows from all batches."""
        self._check(self.sample)
        inputs = tuple(seen.settled() for seen in self.inputs.values())
        recorded = self.sample.recorded(self.network.topology, classes, keep=keep)
        return replace(
            self.origin, probe=probe_of(self.network, inputs, self.engine_stages, recorded)
        )

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
    """What each part costs on some rows, and how noisy the timings were."""
    if not timed:
        return costs_of(engine_stages, x, timed=False, counted=counted), None
    noise = Noise(engine_stages, x)
    noise.time()
    costs = costs_of(engine_stages, x, timed=True, counted=counted)
    if network.topology.is_chain:  # with forks a plan costs its segments, exits and gates
        costs |= runner_costs(network, engine_stages, x, own_threads=engine.own_threads)
    costs |= plain_costs(network, engine, x)
    noise.time()
    return costs, noise.share()


def _with_steady_marks(origin: Origin, network: Network) -> Origin:
    """The marks of code that recording did not change; a Notice names the others."""
    after = dict(code_marks(network))
    changed = [what for what, mark in origin.code if after.get(what) != mark]
    if not changed:
        return origin
    warnings.warn(
        f"{', '.join(changed)} changed attributes or globals that the code reads while it ran, "
        f"such as a cache. "
        "This code will not be compared when the network is opened, only its outputs on the probe.",
        Notice,
        stacklevel=4,
    )
    return replace(origin, code=tuple(pair for pair in origin.code if pair[0] not in changed))


def _large(origin: Origin, columns: dict[str, Array], network: Network) -> list[str]:
    """What to say of logits and scores for which the float band is not meant."""
    told = []
    largest = origin.largest_logit
    if largest > TOLD * ORDINARY:
        told.append(
            f"logits reach {largest:.4g}, so thresholds count as uncertain within "
            f"{origin.band:.2g} of a score "
            f"(the band is {origin.rounding:g} for logits up to {ORDINARY:g}). If these are a few "
            f"broken rows, leave "
            "them out; otherwise scale the logits down."
        )
    for label in network.topology.gate_labels:
        names = network.topology.score_columns(label)
        reached = max(largest_of(columns[name]) for name in names)
        if reached > TOLD * max(ORDINARY, largest) and len(np.unique(columns[names[0]])) > FEW:
            told.append(
                f"scores of gate {label!r} reach {reached:.4g}, and thresholds count as uncertain "
                f"within "
                f"{origin.band:.2g} of a score, which is too little for such scores. Scale them "
                f"to the size of logits."
            )
    return told


def _noisy(noise: float) -> str:
    return (
        f"the milliseconds are noisy: the same call's timings differ by {noise:.0%}; prices in "
        f"milliseconds may be far "
        "off: record where nothing else runs, or use MACs"
    )


def _never_trained(names: Sequence[str]) -> str:
    return (
        f"exits never trained: {', '.join(names)}; their answers mean nothing yet, and calibrate "
        f"refuses this trace; "
        "train them (offramp.fit, or any loop over net(x)), and record again"
    )


class _Growing:
    """A column that grows in place: a gigabyte of logits is not held twice, as a list of parts and
    joined.

    rows: how many there will be, where that is known; a wrong number costs room and nothing else.
    """

    def __init__(self, rows: int | None) -> None:
        self.rows = rows
        self.count = 0
        self.values: Array = np.empty(0)

    def add(self, values: Array) -> None:
        """Put rows behind those that are there."""
        end = self.count + len(values)
        if not self.count:
            self.values = np.empty((max(end, self.rows or 0), *values.shape[1:]), values.dtype)
        elif end > len(self.values):
            # The new room is touched at once, so it is a sixteenth; the system moves big blocks
            # without a copy.
            self.values.resize((max(end, end + end // 16), *values.shape[1:]), refcheck=False)
        self.values[self.count : end] = values
        self.count = end

    def done(self) -> Array:
        """All rows."""
        if self.count < len(self.values):
            self.values.resize((self.count, *self.values.shape[1:]), refcheck=False)
        return self.values


class _Columns:
    """Columns being filled, batch by batch."""

    def __init__(
        self, network: Network, keep: str, training_rows: Array | None, rows: int | None
    ) -> None:
        self.topology = network.topology
        self.exits = network.topology.exit_labels
        self.keep = keep
        known = network.training_rows()
        if known is None:
            own = None
        else:
            own = np.concatenate([known.in_form(FORM), known.rounded])
        some = [digests for digests in (own, training_rows) if digests is not None]
        self.trained_on = np.concatenate(some) if some else None
        # of what a file of the first edition brought
        self.older = None if known is None else known.in_form(1)
        self.rows = rows
        self.sizes: list[int] = []
        self.columns: dict[str, _Growing] = {}
        self.classes = 0
        self.largest_logit = 0.0  # of the exits that gates look at

    def add(self, batch: Batch, state: State, settings: Mapping[str, Array]) -> None:
        found: dict[str, Array] = {"row": batch.row, "digest": batch.digest, **settings}
        if self.older is not None and self.older.size:
            found[OLDER] = digests_of(batch.x, form=1)
        classes = self.classes = self._classes(state)
        if batch.y is not None:
            _check_labels(batch.y, batch.row, classes)
            found["label"] = batch.y
        for name in self.exits:
            logits = state[name + LOGITS].float().cpu().numpy()
            found[f"answer/{name}"] = logits.argmax(1)
            if name != self.exits[-1]:
                self.largest_logit = max(self.largest_logit, largest_of(logits))
            if self.keep == "logits":
                found[f"logits/{name}"] = logits
        last = self.exits[-1]
        given = state.get(last)  # with forks nothing has one answer
        other = (
            given is not None
            and given is not state[last + LOGITS]
            and given.shape == state[last + LOGITS].shape
        )
        # of a cut model that column is its last exit's, whatever the exit is
        if given is not None and other and last != BACKBONE:
            # the exit answers otherwise than the model that it stands on
            plain = given.float().cpu().numpy()
            found |= {f"answer/{BACKBONE}": plain.argmax(1)} | (
                {f"logits/{BACKBONE}": plain} if self.keep == "logits" else {}
            )
        _check_finite(state[self.exits[-1] + LOGITS], batch.row, self.exits[-1])
        for label in self.topology.gate_labels:
            names = self.topology.score_columns(label)
            scores = state[label + SCORE].cpu().numpy().reshape(len(batch), -1)  # [B, K - 1]
            found |= dict(zip(names, scores.T, strict=True))
        for name, column in found.items():
            self.columns.setdefault(name, _Growing(self.rows)).add(column)
        self.sizes.append(len(batch))

    def _classes(self, state: State) -> int:
        widths = {name: int(state[name + LOGITS].shape[1]) for name in self.exits}
        if len(set(widths.values())) > 1:
            raise BadNetwork(
                f"the exits have different numbers of classes ({widths}), expected one; check the "
                f"members"
            )
        return widths[self.exits[-1]]

    def joined(self, processes: Processes) -> dict[str, Array]:
        """Of all processes, which took the batches by turns."""
        names = next((each for each in processes.gathered([*self.columns]) if each), [])
        found: dict[str, Array] = {}
        for name in names:  # one at a time, so that what others hold is here once
            own = self.columns[name].done() if name in self.columns else None
            if processes.count == 1:
                assert own is not None
                found[name] = own
                continue
            batches = [] if own is None else np.split(own, np.cumsum(self.sizes)[:-1])
            found[name] = np.concatenate(processes.woven(batches))
        older = found.pop(OLDER, None)
        if self.trained_on is not None and found:  # once: every look-up sorts all rows that trained
            found["learned"] = np.isin(found["digest"], self.trained_on)
            if older is not None and self.older is not None:
                found["learned"] |= np.isin(older, self.older)
        return found


def _check_labels(y: Array, row: Array, classes: int) -> None:
    bad = np.flatnonzero((y < 0) | (y >= classes))
    if bad.size:
        raise BadData(
            f"{bad.size} labels lie outside 0 to {classes - 1} (row {row[bad[0]]} has "
            f"{y[bad[0]]}); the network has "
            f"{classes} classes: give the data set that it was trained for"
        )


def _check_finite(logits: Tensor, row: Array, exit_: str) -> None:
    bad = np.flatnonzero(~logits.isfinite().all(1).cpu().numpy())
    if bad.size:
        some = ", ".join(map(str, row[bad[:10]])) + (" ..." if bad.size > 10 else "")
        raise BadData(
            f"the answers of exit {exit_!r} are not finite for rows {some}; look for NaN or "
            f"infinities in these rows "
            "and leave them out"
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
