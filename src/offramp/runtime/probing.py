"""What is compared of a network: some of the recorded rows, seeded ones, and rows that are run
again alone.

A promise assumes that a row gets the same logits and scores whatever its batch: rows leave, and the
rest is another batch. `record` runs some rows again, in another batch and alone, and refuses what
differs beyond the float band. What it measured on these rows becomes part of the probe of a plan,
and `open` compares.
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
from offramp.plans.provenance import BAND, ROUNDED, Origin, Probe, RecordedRows
from offramp.plans.signature import Input
from offramp.plans.topology import LEAVE, Topology
from offramp.runtime.merging import carried

PROBE_ROWS = 4  # seeded rows of a probe
DRAWN = 64  # of which these are chosen, where not all have finite outputs
SAMPLED = 16  # recorded rows that are run again
ALONE = 4  # of them alone
NUMBERS = 20_000  # logits of recorded rows that a probe holds at most, but for a last four rows
FEWEST = 4
LOOSER = 4  # times the band of engines that round: what they round differs from batch to batch

Array = np.ndarray[Any, np.dtype[Any]]
Outputs = dict[str, Array]  # "<exit>/logits" [n, C] and "<gate>/score" [n], float32 on the host


def everything(topology: Topology, engine_stages: Sequence[EngineStage], x: State) -> State:
    """Every named tensor of a batch. With forks: logits and scores by the labels of exits and
    gates.

    Those of all paths, or of the dearest alone where there are too many.
    """
    state = dict(x)
    with torch.inference_mode():
        if not topology.is_chain:
            first = engine_stages[0].stage.nodes[0]
            ways = _Ways(
                topology,
                {engine_stage.name: engine_stage for engine_stage in engine_stages},
                tuple(x),
                state,
            )
            ways.follow(
                engine_stages[0].name,
                topology.reference_path(first),
                dict(with_defaults(topology, x)),
            )
            return state
        for engine_stage in engine_stages:
            engine_stage.call(state)
    return state


@dataclass(frozen=True)
class _Ways:
    """All paths of a batch through a schedule, whatever its gates say; what they give is collected
    in `found`.
    """

    topology: Topology
    engine_stages: Mapping[str, EngineStage]
    inputs: tuple[str, ...]
    found: State

    def follow(self, name: str, path: tuple[str, ...], state: State) -> None:
        """Run a stage that was reached on a path, and all that may follow."""
        engine_stage = self.engine_stages[name]
        engine_stage.call(state)
        path = (*path[:-1], *engine_stage.stage.passed)
        label = self.topology.label(path)
        for end in (LOGITS, SCORE):
            if name + end in state and name + end in engine_stage.writes:
                self.found[label + end] = state[name + end]
        if self.topology.has_many_paths:
            edges = engine_stage.stage.edges[-1:]
        else:
            edges = engine_stage.stage.edges
        for edge in edges:
            if edge.to == LEAVE:
                continue
            start = self.engine_stages[edge.to].stage.nodes[0]
            kept = carried(state, edge.carries, self.inputs)
            self.follow(edge.to, (*path, *edge.via, start), kept)


def outputs_of(topology: Topology, state: State) -> Outputs:
    """The logits and scores among named tensors, by the labels of exits and gates."""
    names = [label + LOGITS for label in topology.exit_labels]
    names += [label + SCORE for label in topology.gate_labels]
    return {name: state[name].float().cpu().numpy() for name in names if name in state}


@dataclass(frozen=True)
class ProbeRow:
    """A recorded row: its inputs, each without the batch, and what the network gave for it in its
    batch.
    """

    x: dict[str, Tensor]
    outputs: Outputs

    @property
    def layout(self) -> tuple[object, ...]:
        """What rows of one batch have in common."""
        return tuple((name, value.dtype, value.shape) for name, value in self.x.items())


class Sample:
    """The recorded rows with the smallest digests: a random draw that depends on no order of the
    rows.

    Rows with logits that are not finite are left out, and of equal rows all but one. Scores may be
    infinite: a gate that says yes or no gives such scores, and may look at other rows as any other
    gate may.
    """

    def __init__(self, size: int = SAMPLED) -> None:
        self.size = size
        self.rows: dict[int, ProbeRow] = {}

    def add(self, digests: Array, x: State, outputs: Outputs) -> None:
        """Look at a batch: digests [B], inputs, and the outputs for them."""
        if len(self.rows) >= self.size:
            limit = max(self.rows)
        else:
            limit = np.iinfo(np.uint64).max
        finite = np.ones(len(digests), bool)
        for name, value in outputs.items():
            if name.endswith(LOGITS):
                finite &= np.isfinite(value.reshape(len(value), -1)).all(1)
        for at in np.flatnonzero(finite & (digests <= limit)).tolist():
            digest = int(digests[at])
            if digest not in self.rows:
                inputs = {name: value[at].detach().cpu().clone() for name, value in x.items()}
                self.rows[digest] = ProbeRow(
                    inputs, {name: value[at] for name, value in outputs.items()}
                )
        self._trim()

    def joined(self, others: Sequence[Mapping[int, ProbeRow]]) -> None:
        """Take in the rows of other processes."""
        for other in others:
            self.rows.update(other)
        self._trim()

    def _trim(self) -> None:
        self.rows = {digest: self.rows[digest] for digest in sorted(self.rows)[: self.size]}

    def groups(self) -> Iterator[list[ProbeRow]]:
        """The rows in batches of one layout each: texts have several lengths."""
        found: dict[tuple[object, ...], list[ProbeRow]] = {}
        for row in self.rows.values():
            found.setdefault(row.layout, []).append(row)
        yield from found.values()

    def recorded(self, topology: Topology, classes: int, *, keep: bool) -> RecordedRows | None:
        """What a probe holds of these rows: as many as are small, all of one layout; their values
        if `keep`.
        """
        finite = {digest: row for digest, row in self.rows.items() if _finite(row)}
        if not finite:
            return None
        layout = next(iter(finite.values())).layout
        alike = {digest: row for digest, row in finite.items() if row.layout == layout}
        count = max(FEWEST, NUMBERS // (classes * len(topology.exit_labels)))
        chosen = dict(list(alike.items())[:count])
        outputs = _stacked([row.outputs for row in chosen.values()])
        return RecordedRows(
            digests=tuple(f"{digest:016x}" for digest in chosen),
            logits=_plain(outputs[label + LOGITS] for label in topology.exit_labels),
            scores=_plain(outputs[label + SCORE] for label in topology.gate_labels),
            values=_values([row.x for row in chosen.values()]) if keep else None,
        )


def _finite(row: ProbeRow) -> bool:
    """Whether a file of numbers can hold all outputs of this row."""
    return all(bool(np.isfinite(value).all()) for value in row.outputs.values())


def probe_of(
    network: Network,
    inputs: tuple[Input, ...],
    engine_stages: Sequence[EngineStage],
    recorded: RecordedRows | None,
) -> Probe:
    """The probe of a network: what it gives for seeded rows, as far as that is finite.

    Where the model fails on drawn rows (an index that must fit another one), there are recorded
    rows alone.
    """
    topology = network.topology
    every = tuple(range(PROBE_ROWS))
    for drawn in (PROBE_ROWS, DRAWN):
        blank = Probe(inputs, 0, (((),) * drawn,))
        try:
            state = everything(topology, engine_stages, as_inputs(blank.batch(), network.device()))
        except (OfframpError, RuntimeError, IndexError, ValueError, TypeError):
            every = ()
            break
        outputs = outputs_of(topology, state)
        finite = np.ones(drawn, bool)
        for value in outputs.values():
            finite &= np.isfinite(value.reshape(drawn, -1)).all(1)
        every = tuple(np.flatnonzero(finite)[:PROBE_ROWS].tolist())
        if len(every) == PROBE_ROWS:
            break
    picks = np.array(every, np.int64)
    if every:
        logits = _plain(outputs[label + LOGITS][picks] for label in topology.exit_labels)
        scores = _plain(outputs[label + SCORE][picks] for label in topology.gate_labels)
    else:
        logits = ((),) * len(topology.exit_labels)
        scores = ((),) * len(topology.gate_labels)
    return Probe(inputs, 0, logits, scores, every, recorded)


def require_independent(
    network: Network,
    engine_stages: Sequence[EngineStage],
    groups: Sequence[Sequence[ProbeRow]],
    origin: Origin,
) -> None:
    """Raise BadNetwork when rows that are run again, in another batch or alone, get other logits or
    scores.

    What is compared must agree within the float band. A score may differ where an answer changed
    within the band: a counter of equal answers does. Torch's generator is left as it was.
    """
    device = network.device()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for group in groups:
            alone = [[row] for row in group[:ALONE]]
            for some in ([list(group)] if len(group) > 1 else []) + alone:
                x = {
                    name: torch.stack([row.x[name] for row in some]).to(device)
                    for name in some[0].x
                }
                before = _stacked([row.outputs for row in some])
                now = outputs_of(network.topology, everything(network.topology, engine_stages, x))
                found = differing(before, now, network.topology, _tolerance(origin, device))
                if found is not None:
                    again = outputs_of(
                        network.topology, everything(network.topology, engine_stages, x)
                    )
                    raise BadNetwork(_dependent(found, len(some), drawn=_differ(now, again)))


def _tolerance(origin: Origin, device: torch.device) -> float:
    """How far logits of 10 may lie apart in two batches."""
    if origin.rounding != BAND:
        return LOOSER * origin.rounding
    # Convolutions on a GPU may round to eleven bits, as half precision does, and may choose to at
    # each batch size
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return ROUNDED
    return BAND


def _dependent(found: tuple[str, float], count: int, *, drawn: bool) -> str:
    name, far = found
    node, _, kind = name.rpartition("/")
    if "/" + kind == SCORE:
        what = f"the score of gate {node!r}"
    else:
        what = f"the answer of exit {node!r}"
    if drawn:
        return (
            f"{what} is another one when the same rows are run again ({far:.2g} apart): something "
            f"in the network "
            "draws at random, such as a dropout that stays on; switch it off, since rows must be "
            "decided the same way "
            "whenever they come"
        )
    how = "alone" if count == 1 else "in another batch"
    return (
        f"{what} is another one when a row is run {how} ({far:.2g} apart): it depends on the "
        f"other rows of the batch, "
        "and these change when rows leave; compute it from the row alone (see "
        "offramp.testing.check_gate)"
    )


def _differ(one: Outputs, other: Outputs) -> bool:
    return any(not np.array_equal(one[name], other[name], equal_nan=True) for name in one)


def differing(
    before: Outputs, now: Outputs, topology: Topology, band: float
) -> tuple[str, float] | None:
    """The first output that differs by more than the band, and by how much; None when all agree.

    Logits and scores may differ by the band, or by a tenth of it times the largest logit of that
    exit. Where an exit answers a row otherwise, within the band, scores of this row are not
    compared. Outputs [n, ...] that only one side has are not compared, nor are logits that are not
    finite in `before`. Equal infinite scores agree, and so do two scores that are no numbers; one
    of these agrees with nothing else.
    """
    count = len(next(iter(before.values())))
    changed = np.zeros(count, bool)
    allowed: dict[str, float] = {}
    for name in topology.exit_labels:
        key = name + LOGITS
        if key not in before or key not in now or not count:
            continue
        finite = np.isfinite(before[key]).all(1)
        if not finite.any():
            continue
        want = before[key][finite]
        got = now[key][finite]
        allowed[name] = band * max(1.0, float(np.abs(want).max()) / 10)
        if got.shape == want.shape:
            far = float(np.abs(got - want).max())
        else:
            far = float("inf")
        if not far <= allowed[name]:
            return key, far
        changed |= before[key].argmax(1) != now[key].argmax(1)
    for name in topology.gate_labels:
        key = name + SCORE
        if key not in before or key not in now:
            continue
        want = before[key][~changed]
        got = now[key][~changed]
        both = np.isfinite(want) & np.isfinite(got)
        if not (both | (want == got) | (np.isnan(want) & np.isnan(got))).all():
            return key, float("inf")
        if not both.any():
            continue
        want = want[both]
        got = got[both]
        far = float(np.abs(got - want).max())
        if not far <= max(allowed.get(name, band), band * float(np.abs(want).max()) / 10):
            return key, far
    return None


def compare_probe(
    network: Network, plan: Plan, engine_stages: Sequence[EngineStage], example: Any = None
) -> None:
    """Raise Mismatch when parts give other logits or scores than when the plan was made.

    Compared are the seeded rows of its probe, its recorded rows where they were kept, and those
    rows of `example` whose digests it knows. Running them also makes an engine that compiles do so
    now.
    """
    probe = plan.origin.probe if plan.origin else None
    if plan.origin is None or probe is None:
        return
    if probe.rows is None or probe.rows:
        _compare(
            network,
            engine_stages,
            probe.batch(),
            probe.logits,
            probe.scores,
            plan.origin,
            "the seeded rows",
        )
    if probe.recorded is None:
        return
    known = probe.recorded
    if kept := known.arrays():
        _compare(
            network,
            engine_stages,
            given_as(kept),
            known.logits,
            known.scores,
            plan.origin,
            "recorded rows",
        )
    if example is not None:
        batch = next(rows(_as_data(example)).batches(count_of(as_inputs(example))))
        wanted = {int(text, 16): index for index, text in enumerate(known.digests)}
        pairs = [
            (at, wanted[digest])
            for at, digest in enumerate(batch.digest.tolist())
            if digest in wanted
        ]
        if pairs:
            ours, its = np.array(pairs, np.int64).T
            some = {name: value[ours] for name, value in as_inputs(batch.x).items()}
            logits = tuple(tuple(each[index] for index in its) for each in known.logits)
            scores = tuple(tuple(each[index] for index in its) for each in known.scores)
            _compare(
                network, engine_stages, given_as(some), logits, scores, plan.origin, "recorded rows"
            )


def given_as(named: Mapping[str, Any]) -> Any:
    """Values by the names of inputs as a network takes them."""
    if "x" in named:
        return named["x"]
    return {name.removeprefix("x/"): value for name, value in named.items()}


def _as_data(example: Any) -> Any:
    """A batch as `offramp.rows` takes it: several positional inputs by their places."""
    if isinstance(example, (tuple, list)):
        return {str(index): value for index, value in enumerate(example)}
    return example


def _compare(
    network: Network,
    engine_stages: Sequence[EngineStage],
    x: Any,
    logits: Any,
    scores: Any,
    origin: Origin,
    what: str,
) -> None:
    before = {
        name + LOGITS: np.array(each, np.float32)
        for name, each in zip(network.topology.exit_labels, logits, strict=True)
    }
    if scores is not None:
        pairs = zip(network.topology.gate_labels, scores, strict=True)
        before |= {name + SCORE: np.array(each, np.float32) for name, each in pairs}
    now = outputs_of(
        network.topology,
        everything(network.topology, engine_stages, as_inputs(x, network.device())),
    )
    found = differing(before, now, network.topology, origin.rounding)
    if found is None:
        return
    name, far = found
    node, _, kind = name.rpartition("/")
    if "/" + kind == SCORE:
        raise Mismatch(
            f"gate {node!r} scores {what} of the plan {far:.2g} away from where it was made (band "
            f"{origin.rounding:g}): its code is another one, or this machine computes "
            f"differently; record and "
            "calibrate here"
        )
    raise Mismatch(
        f"exit {node!r} answers {what} of the plan's probe {far:.2g} away from where the plan was "
        f"made (band "
        f"{origin.rounding:g}): the code of the model is another one, or this machine computes "
        f"differently; record and "
        "calibrate here"
    )


def _stacked(some: Sequence[Outputs]) -> Outputs:
    return {name: np.stack([outputs[name] for outputs in some]) for name in some[0]}


def _plain(arrays: Iterator[Array]) -> Any:
    return tuple(_tuples(array.tolist()) for array in arrays)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _values(
    some: Sequence[Mapping[str, Tensor]],
) -> tuple[tuple[str, str, tuple[int, ...], str], ...]:
    found = []
    for name in some[0]:
        array = np.stack([row[name].numpy() for row in some])
        raw = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
        found.append((name, array.dtype.name, array.shape, base64.b64encode(raw).decode()))
    return tuple(found)
