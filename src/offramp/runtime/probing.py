"""Compares outputs of a network: of rows run again in another batch, and of rows recorded before.

A promise assumes that a row gets the same logits and scores in every batch, because rows leave and
the others continue in a smaller batch. `record` therefore runs some rows again, in another batch
and alone, and raises an error if the outputs differ by more than the float band. The outputs of
these rows become part of the probe of a plan. `open` compares them with those of the network that
it opens.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.data.rows import rows
from offramp.errors import BadNetwork, Mismatch, OfframpError
from offramp.networks.inputs import State, as_inputs, count_of
from offramp.networks.network import LOGITS, SCORE, EngineStage, Network
from offramp.networks.walking import with_defaults
from offramp.plans.plan import Plan
from offramp.plans.provenance import BAND, ROUNDED, Logits, Origin, Probe, RecordedRows, Scores
from offramp.plans.signature import Input
from offramp.plans.topology import LEAVE, Topology
from offramp.runtime.merging import carried, picked

PROBE_ROWS = 4  # seeded rows of a probe
DRAWN = 64  # drawn rows to choose them from, if not all have finite outputs
SAMPLED = 16  # recorded rows that are run again
ALONE = 4  # of these, rows that are run alone
NUMBERS = 20_000  # logits of recorded rows that a probe holds at most, except for `FEWEST` rows
FEWEST = 4  # recorded rows that a probe always holds
LOOSER = 4  # times the band, for engines that round: their rounding differs from batch to batch

Array = np.ndarray[Any, np.dtype[Any]]
# "<exit>/logits" [n, C] and "<gate>/score" [n], float32 on the host
NamedOutputs = dict[str, Array]


def everything(topology: Topology, engine_stages: Sequence[EngineStage], x: State) -> State:
    """Run all stages on a batch.

    Args:
        topology: of the network.
        engine_stages: with every exit and gate.
        x: inputs by name, [B, ...] each.

    Returns:
        Every named tensor, the inputs included. With forks: the inputs, and the logits and scores
        of all paths by the labels of exits and gates. If there are too many paths, those of the
        most expensive path alone.
    """
    state = dict(x)
    with torch.inference_mode():
        if topology.is_chain:
            for engine_stage in engine_stages:
                engine_stage.call(state)
            return state
        first = engine_stages[0]
        by_name = {engine_stage.name: engine_stage for engine_stage in engine_stages}
        paths = _Paths(topology, by_name, tuple(x), state)
        start = topology.reference_path(first.stage.nodes[0])
        paths.follow(first.name, start, dict(with_defaults(topology, x)))
    return state


@dataclass(frozen=True)
class _Paths:
    """Runs a batch along all paths of a schedule, whatever its gates decide.

    Attributes:
        topology: of the network.
        engine_stages: by name.
        inputs: names of the inputs.
        outputs: takes the logits and scores, by the labels of exits and gates.
    """

    topology: Topology
    engine_stages: Mapping[str, EngineStage]
    inputs: tuple[str, ...]
    outputs: State

    def follow(self, name: str, path: tuple[str, ...], state: State) -> None:
        """Run a stage that was reached on a path, and then all stages that may follow.

        Args:
            name: of the stage.
            path: the nodes on the way to it, its first node included.
            state: the named tensors that came along this path.
        """
        engine_stage = self.engine_stages[name]
        engine_stage.call(state)
        # The last node of the path is the first of the stage, which may pass several nodes.
        path = (*path[:-1], *engine_stage.stage.passed)
        label = self.topology.label(path)
        for ending in (LOGITS, SCORE):
            if name + ending in state and name + ending in engine_stage.writes:
                self.outputs[label + ending] = state[name + ending]
        edges = engine_stage.stage.edges
        if self.topology.has_many_paths:
            edges = edges[-1:]
        for edge in edges:
            if edge.to == LEAVE:
                continue
            start = self.engine_stages[edge.to].stage.nodes[0]
            state_there = carried(state, edge.carries, self.inputs)
            self.follow(edge.to, (*path, *edge.via, start), state_there)


def outputs_of(topology: Topology, state: State) -> NamedOutputs:
    """The logits and scores among named tensors, by the labels of exits and gates."""
    names = [label + LOGITS for label in topology.exit_labels]
    names += [label + SCORE for label in topology.gate_labels]
    outputs: NamedOutputs = {}
    for name in names:
        if name in state:
            outputs[name] = state[name].float().cpu().numpy()
    return outputs


@dataclass(frozen=True)
class ProbeRow:
    """A recorded row.

    Attributes:
        x: its inputs by name, without the batch dimension.
        outputs: the logits and scores that the network gave for it in its batch.
    """

    x: dict[str, Tensor]
    outputs: NamedOutputs

    @property
    def layout(self) -> tuple[object, ...]:
        """Names, types and shapes of the inputs. Rows of one layout can form a batch."""
        return tuple((name, value.dtype, value.shape) for name, value in self.x.items())


class Sample:
    """The recorded rows with the smallest digests. This is a random draw that does not depend on
    the order of the rows.

    Rows with logits that are not finite are left out, and duplicates. Scores may be infinite: a
    gate that decides yes or no gives infinite scores, and it may depend on other rows just like any
    other gate.

    Attributes:
        size: rows to keep.
        rows: by digest.
    """

    def __init__(self, size: int = SAMPLED) -> None:
        self.size = size
        self.rows: dict[int, ProbeRow] = {}

    def add(self, digests: Array, x: State, outputs: NamedOutputs) -> None:
        """Consider the rows of a batch.

        Args:
            digests: of the rows, [B].
            x: inputs by name, [B, ...] each.
            outputs: logits [B, C] and scores [B] by name.
        """
        limit = int(np.iinfo(np.uint64).max)
        if len(self.rows) >= self.size:
            limit = max(self.rows)
        logits: NamedOutputs = {}  # only these must be finite
        for name, value in outputs.items():
            if name.endswith(LOGITS):
                logits[name] = value
        eligible = _finite_rows(logits, len(digests)) & (digests <= limit)
        for index in np.flatnonzero(eligible).tolist():
            digest = int(digests[index])
            if digest not in self.rows:
                # copies, so that the batch can be freed
                inputs = {
                    name: row.detach().cpu().clone() for name, row in picked(x, index).items()
                }
                self.rows[digest] = ProbeRow(inputs, picked(outputs, index))
        self._trim()

    def joined(self, others: Sequence[Mapping[int, ProbeRow]]) -> None:
        """Take in the rows of other processes."""
        for other in others:
            self.rows.update(other)
        self._trim()

    def _trim(self) -> None:
        smallest = sorted(self.rows)[: self.size]
        self.rows = {digest: self.rows[digest] for digest in smallest}

    def groups(self) -> Iterator[list[ProbeRow]]:
        """The rows in groups of one layout. Texts, for example, have several lengths."""
        groups: dict[tuple[object, ...], list[ProbeRow]] = {}
        for row in self.rows.values():
            groups.setdefault(row.layout, []).append(row)
        yield from groups.values()

    def recorded(self, topology: Topology, classes: int, *, keep: bool) -> RecordedRows | None:
        """The rows that a probe holds: finite outputs, all of one layout, few enough to be small.

        Args:
            topology: of the network.
            classes: of the logits.
            keep: whether the probe also holds the rows themselves.

        Returns:
            The rows; None if there are none.
        """
        count = max(FEWEST, NUMBERS // (classes * len(topology.exit_labels)))
        chosen = dict[int, ProbeRow]()
        layout: tuple[object, ...] | None = None
        for digest, row in self.rows.items():
            if not _is_finite(row):
                continue
            layout = layout or row.layout  # that of the first row
            if row.layout == layout and len(chosen) < count:
                chosen[digest] = row
        if not chosen:
            return None
        outputs = _stacked([row.outputs for row in chosen.values()])
        logits, scores = _as_tuples(topology, outputs)
        values = None
        if keep:
            values = _values([row.x for row in chosen.values()])
        return RecordedRows(tuple(f"{digest:016x}" for digest in chosen), logits, scores, values)


def _is_finite(row: ProbeRow) -> bool:
    """Whether a file of numbers can hold all outputs of this row."""
    for value in row.outputs.values():
        if not np.isfinite(value).all():
            return False
    return True


def _finite_rows(outputs: NamedOutputs, count: int) -> Array:
    """Which of `count` rows have only finite numbers, [count] bool."""
    finite = np.ones(count, bool)
    for value in outputs.values():
        finite &= np.isfinite(value.reshape(count, -1)).all(1)
    return finite


def probe_of(
    network: Network,
    inputs: tuple[Input, ...],
    engine_stages: Sequence[EngineStage],
    recorded: RecordedRows | None,
) -> Probe:
    """Make the probe of a network: its outputs for seeded rows and for recorded ones.

    Seeded rows are drawn within the range of the recorded inputs. Rows with outputs that are not
    finite are left out; if there are too few others, more rows are drawn. If the model fails on
    drawn rows (for example, because one index must fit another), the probe has recorded rows alone.

    Args:
        network: in eval mode.
        inputs: names, types, shapes and ranges of the recorded inputs.
        engine_stages: with every exit and gate.
        recorded: some of the recorded rows; None for none.
    """
    topology = network.topology
    picks: tuple[int, ...] = ()
    outputs: NamedOutputs = {}
    for drawn in (PROBE_ROWS, DRAWN):
        blank = Probe(inputs, 0, (((),) * drawn,))
        try:
            state = everything(topology, engine_stages, as_inputs(blank.batch(), network.device()))
        except (OfframpError, RuntimeError, IndexError, ValueError, TypeError):
            picks = ()
            break
        outputs = outputs_of(topology, state)
        finite = _finite_rows(outputs, drawn)
        picks = tuple(np.flatnonzero(finite)[:PROBE_ROWS].tolist())
        if len(picks) == PROBE_ROWS:
            break
    if not picks:
        no_logits: Logits = ((),) * len(topology.exit_labels)
        no_scores: Scores = ((),) * len(topology.gate_labels)
        return Probe(inputs, 0, no_logits, no_scores, (), recorded)
    rows_picked = np.array(picks, np.int64)
    logits, scores = _as_tuples(topology, picked(outputs, rows_picked))
    return Probe(inputs, 0, logits, scores, picks, recorded)


def require_independent(
    network: Network,
    engine_stages: Sequence[EngineStage],
    groups: Sequence[Sequence[ProbeRow]],
    origin: Origin,
) -> None:
    """Run recorded rows again, all together and some alone, and compare the outputs.

    They must agree within the float band. Scores of a row are not compared if the answer of the row
    changed within the band, because a gate may count equal answers. Torch's generator keeps its
    state.

    Args:
        network: in eval mode.
        engine_stages: with every exit and gate.
        groups: recorded rows, each group of one layout.
        origin: of the trace, which knows the band.

    Raises:
        BadNetwork: logits or scores differ.
    """
    device = network.device()
    topology = network.topology
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for batch in _other_batches(groups):
            x: State = {}
            for name in batch[0].x:
                x[name] = torch.stack([row.x[name] for row in batch]).to(device)  # [n, ...]
            before = _stacked([row.outputs for row in batch])
            now = outputs_of(topology, everything(topology, engine_stages, x))
            difference = differing(before, now, topology, _tolerance(origin, device))
            if difference is None:
                continue
            again = outputs_of(topology, everything(topology, engine_stages, x))
            raise BadNetwork(
                _differs_in_batch(difference, len(batch), random=not _are_equal(now, again))
            )


def _other_batches(groups: Sequence[Sequence[ProbeRow]]) -> Iterator[Sequence[ProbeRow]]:
    """Batches to run again: each group as a whole, and its first rows alone."""
    for group in groups:
        if len(group) > 1:
            yield group
        for row in group[:ALONE]:
            yield [row]


def _tolerance(origin: Origin, device: torch.device) -> float:
    """How much logits up to 10 may differ between two batches."""
    if origin.rounding != BAND:
        return LOOSER * origin.rounding
    # Convolutions on a GPU may round to eleven bits, like half precision, and they may decide so
    # for each batch size.
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return ROUNDED
    return BAND


def _differs_in_batch(difference: tuple[str, float], count: int, *, random: bool) -> str:
    """The sentence for outputs that differ in another batch, or at random."""
    name, distance = difference
    node, is_score = _node_of(name)
    what = f"the score of gate {node!r}" if is_score else f"the answer of exit {node!r}"
    if random:
        return (
            f"{what} differs by {distance:.2g} when the same rows are run again. Something in the "
            "network draws at random, such as a dropout that stays on. Switch it off: a row must "
            "be decided the same way every time."
        )
    how = "alone" if count == 1 else "in another batch"
    return (
        f"{what} differs by {distance:.2g} when a row is run {how}. It depends on the other rows "
        "of the batch, and these change when rows leave. Compute it from the row alone (see "
        "offramp.testing.check_gate)."
    )


def _node_of(name: str) -> tuple[str, bool]:
    """The node of an output, and whether the output is a score: `small/score` -> small, True."""
    node, _, ending = name.rpartition("/")
    return node, "/" + ending == SCORE


def _are_equal(first: NamedOutputs, second: NamedOutputs) -> bool:
    """Whether all outputs are equal, bit for bit; NaN is equal to NaN."""
    for name, value in first.items():
        if not np.array_equal(value, second[name], equal_nan=True):
            return False
    return True


def differing(
    before: NamedOutputs, now: NamedOutputs, topology: Topology, band: float
) -> tuple[str, float] | None:
    """Find the first output that differs by more than the band.

    Logits and scores may differ by the band, or by a tenth of it times the largest logit of that
    exit. If an exit changes its answer to a row within the band, scores of this row are not
    compared. Outputs that only one side has are not compared, and neither are logits that are not
    finite in `before`. Equal infinite scores agree, and so do two NaN scores; an infinite or NaN
    score agrees with nothing else.

    Args:
        before: outputs [n, ...] by name.
        now: outputs of the same rows.
        topology: of the network.
        band: by which logits up to 10 may differ.

    Returns:
        The name of the output and the distance; None if all agree.
    """
    count = len(next(iter(before.values())))
    changed = np.zeros(count, bool)  # rows with another answer
    allowed: dict[str, float] = {}  # by exit
    for name in topology.exit_labels:
        key = name + LOGITS
        if key not in before or key not in now or not count:
            continue
        finite = np.isfinite(before[key]).all(1)  # [n, C] -> [n]
        if not finite.any():
            continue
        old_logits = before[key][finite]
        new_logits = now[key][finite]
        allowed[name] = band * max(1.0, float(np.abs(old_logits).max()) / 10)
        distance = float("inf")
        if new_logits.shape == old_logits.shape:
            distance = float(np.abs(new_logits - old_logits).max())
        if not distance <= allowed[name]:  # also for NaN
            return key, distance
        changed |= before[key].argmax(1) != now[key].argmax(1)

    for name in topology.gate_labels:
        key = name + SCORE
        if key not in before or key not in now:
            continue
        old_scores = before[key][~changed]
        new_scores = now[key][~changed]
        both_finite = np.isfinite(old_scores) & np.isfinite(new_scores)
        both_nan = np.isnan(old_scores) & np.isnan(new_scores)
        if not (both_finite | both_nan | (old_scores == new_scores)).all():
            return key, float("inf")
        if not both_finite.any():
            continue
        old_scores = old_scores[both_finite]
        new_scores = new_scores[both_finite]
        distance = float(np.abs(new_scores - old_scores).max())
        relative = band * float(np.abs(old_scores).max()) / 10
        if not distance <= max(allowed.get(name, band), relative):
            return key, distance
    return None


def compare_probe(
    network: Network, plan: Plan, engine_stages: Sequence[EngineStage], example: Any = None
) -> None:
    """Compare outputs with those stored when the plan was made.

    Compared are the seeded rows of the plan's probe, its recorded rows if they were kept, and those
    rows of `example` whose digests the plan knows. An engine that compiles does so during this
    call.

    Args:
        network: in eval mode.
        plan: the plan. One without a probe passes.
        engine_stages: with every exit and gate.
        example: rows as a network takes them; None for none.

    Raises:
        Mismatch: logits or scores differ.
    """
    if plan.origin is None or plan.origin.probe is None:
        return
    origin = plan.origin
    probe = plan.origin.probe
    if probe.rows is None or probe.rows:
        stored = _stored_outputs(network.topology, probe.logits, probe.scores)
        _compare(network, engine_stages, probe.batch(), stored, origin, "the seeded rows")
    if probe.recorded is None:
        return
    recorded = probe.recorded
    stored = _stored_outputs(network.topology, recorded.logits, recorded.scores)
    arrays = recorded.arrays()
    if arrays:
        _compare(network, engine_stages, given_as(arrays), stored, origin, "recorded rows")
    if example is None:
        return

    # Rows of the example that are recorded rows: their positions in the example and in the plan.
    batch = next(rows(_as_data(example)).batches(count_of(as_inputs(example))))
    position_of = {int(text, 16): index for index, text in enumerate(recorded.digests)}
    in_example = list[int]()
    in_plan = list[int]()
    for index, digest in enumerate(batch.digest.tolist()):
        if digest in position_of:
            in_example.append(index)
            in_plan.append(position_of[digest])
    if in_example:
        x = picked(as_inputs(batch.x), in_example)
        stored = picked(stored, in_plan)
        _compare(network, engine_stages, given_as(x), stored, origin, "recorded rows")


def given_as(named: Mapping[str, Any]) -> Any:
    """Values by the names of inputs, in the form that a network takes."""
    if "x" in named:
        return named["x"]
    return {name.removeprefix("x/"): value for name, value in named.items()}


def _as_data(example: Any) -> Any:
    """A batch as `offramp.rows` takes it: positional inputs by their numbers."""
    if isinstance(example, (tuple, list)):
        return {str(index): value for index, value in enumerate(example)}
    return example


def _stored_outputs(topology: Topology, logits: Logits, scores: Scores | None) -> NamedOutputs:
    """The outputs that a probe stores, by name. Probes of the first version have no scores."""
    outputs: NamedOutputs = {}
    for label, values in zip(topology.exit_labels, logits, strict=True):
        outputs[label + LOGITS] = np.array(values, np.float32)  # [n, C]
    if scores is not None:
        for label, row in zip(topology.gate_labels, scores, strict=True):
            outputs[label + SCORE] = np.array(row, np.float32)  # [n]
    return outputs


def _compare(
    network: Network,
    engine_stages: Sequence[EngineStage],
    x: Any,
    stored: NamedOutputs,
    origin: Origin,
    what: str,
) -> None:
    """Raise Mismatch if the outputs for rows x differ from stored ones; `what` names the rows."""
    topology = network.topology
    state = everything(topology, engine_stages, as_inputs(x, network.device()))
    difference = differing(stored, outputs_of(topology, state), topology, origin.rounding)
    if difference is None:
        return
    name, distance = difference
    node, is_score = _node_of(name)
    who = f"the scores of gate {node!r}" if is_score else f"the answers of exit {node!r}"
    code = "the gate" if is_score else "the model"
    raise Mismatch(
        f"{who} on {what} differ by {distance:.2g} from those in the plan's probe (band "
        f"{origin.rounding:g}). The code of {code} has changed, or this machine computes "
        "differently. Record and calibrate here."
    )


def _stacked(outputs: Sequence[NamedOutputs]) -> NamedOutputs:
    """Outputs of single rows as outputs of a batch: n times [...] -> [n, ...]."""
    batch: NamedOutputs = {}
    for name in outputs[0]:
        batch[name] = np.stack([row[name] for row in outputs])
    return batch


def _as_tuples(topology: Topology, outputs: NamedOutputs) -> tuple[Logits, Scores]:
    """Logits [exits][n][classes] and scores [gates][n] as a probe stores them."""
    logits = [_tuples(outputs[label + LOGITS].tolist()) for label in topology.exit_labels]
    scores = [_tuples(outputs[label + SCORE].tolist()) for label in topology.gate_labels]
    return tuple(logits), tuple(scores)


def _tuples(value: Any) -> Any:
    """Nested lists as nested tuples."""
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    return value


def _values(
    inputs: Sequence[Mapping[str, Tensor]],
) -> tuple[tuple[str, str, tuple[int, ...], str], ...]:
    """Rows as a probe stores them: name, type, shape and little-endian bytes of each input."""
    stored = list[tuple[str, str, tuple[int, ...], str]]()
    for name in inputs[0]:
        array = np.stack([row[name].numpy() for row in inputs])  # [n, ...]
        raw = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
        stored.append((name, array.dtype.name, array.shape, base64.b64encode(raw).decode()))
    return tuple(stored)
