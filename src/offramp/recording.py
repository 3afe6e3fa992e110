"""All exits on all rows -> Trace."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.data.rows import Batch, Rows, digests_of, fingerprint_of, rows
from offramp.dependence import require_read
from offramp.engine import engine_of
from offramp.errors import BadData, BadNetwork, BetterExit, NeverTaught
from offramp.evaluation import better_exit
from offramp.find import find_file
from offramp.inputs import State, as_inputs
from offramp.measuring import costs_of
from offramp.network import LOGITS, SCORE, Network, Part
from offramp.processes import Processes, here
from offramp.progress import track
from offramp.provenance import FORM, Origin, Probe
from offramp.signature import Input
from offramp.trace import BACKBONE, Header, Trace

PROBE_ROWS = 4
OLDER = "digest/1"  # a column that no trace keeps

Array = np.ndarray[Any, np.dtype[Any]]


def record(
    network: Network,
    data: object,
    *,
    batch_size: int = 64,
    keep: str = "logits",
    timed: bool = True,
    engine: str = "torch",
    progress: bool = True,
) -> Trace:
    """Run every exit and gate on every row, and measure what each part costs.

    data: whatever `offramp.data.rows` takes: arrays, (x, y), a Dataset, a DataLoader, batches, or a spec such as
    "cifar10:DIR[1000:5000]". keep: "logits", or "answers" to leave the logits [N, C] out.
    timed: measure milliseconds over batch 1 to 64; do so where nothing else runs.
    engine: torch, onnxruntime or openvino, with options as in "torch:bf16" (see the engines); the plans that are
    made of this trace run on it, and on no other.
    Where several processes were launched, all must call it: they take whole batches by turns (so that the last bits are
    those of one process), the main one measures costs when the others have ended, and each gets the whole trace.
    Raises BadData (no rows, labels out of range, wrong shapes, rows that give NaN), BadNetwork, MissingExtra.
    """
    if keep not in ("logits", "answers"):
        raise BadData(f"keep is {keep!r}, expected 'logits' or 'answers'")
    network.require_eval()
    if untaught := network.untaught():
        warnings.warn(_never_taught(untaught), NeverTaught, stacklevel=2)
    source, place = rows(data), network.device()
    steps, processes = network.chain.walk(network.chain.gates), here(place)
    if processes.count > 1:
        processes.require_same(network.fingerprint(), "network")
    shelved, identity = engine_of(engine)
    parts: Sequence[Part] = shelved.open(network, steps, place)
    counted: Sequence[Part] = parts if engine == "torch" else find_file("engines", "torch").open(network, steps, place)
    room = source.length if processes.count == 1 else None
    columns, batches = _Columns(network, keep, shelved.learned, room), source.batches(batch_size, processes.turn)
    total = None if source.length is None else -(-source.length // (batch_size * processes.count))
    shown = track(batches, what="recording", total=total, show=progress and processes.main)
    first = processes.agreed(lambda: _recorded(shown, columns, parts, network, source.name))
    found = columns.joined(processes)
    if not found:
        raise BadData(f"{source.name} has no rows, expected at least one; check the selection")
    costs, probe = processes.alone(lambda: _measured(network, first, parts, counted, timed=timed))
    trace = _trace(network, source, found | costs, identity, probe)
    if trace.labels is not None:
        said = better_exit(trace.answers == trace.labels[:, None], trace.chain.exits)
        if said is not None:
            warnings.warn(said, BetterExit, stacklevel=2)
    return trace


def _recorded(batches: Iterable[Batch], columns: _Columns, parts: Sequence[Part], network: Network, what: str) -> State:
    """Fill the columns; returns the first batch."""
    first: State = {}
    place = network.device()
    for batch in batches:
        x = as_inputs(batch.x, place)
        if not first:
            require_read(network, x, what)
            first = x
        columns.add(batch, _everything(parts, x))
    return first


def _measured(
    network: Network, x: State, parts: Sequence[Part], counted: Sequence[Part], *, timed: bool
) -> tuple[dict[str, Array], Probe]:
    """What each part costs on some rows, and the probe for rows of their shapes."""
    inputs = tuple(Input.of(name, value.cpu().numpy()) for name, value in x.items())
    return costs_of(parts, x, timed=timed, counted=counted), _probe(network, inputs, parts)


def _never_taught(names: Sequence[str]) -> str:
    return (
        f"exits never taught: {', '.join(names)}; their answers mean nothing yet, and calibrate refuses this trace; "
        "teach them (offramp.fit, or any loop over net(x)), and record again"
    )


def _everything(parts: Sequence[Part], x: State) -> State:
    """Every named tensor of a batch."""
    state = dict(x)
    with torch.inference_mode():
        for part in parts:
            part.call(state)
    return state


class _Growing:
    """A column that grows in place: a gigabyte of logits is not held twice, as a list of parts and joined.

    rows: how many there will be, where that is known; a wrong number costs room and nothing else.
    """

    def __init__(self, rows: int | None) -> None:
        self.rows = rows
        self.count = 0
        self.values: Array = np.empty(0)

    def add(self, part: Array) -> None:
        """Put rows behind those that are there."""
        end = self.count + len(part)
        if not self.count:
            self.values = np.empty((max(end, self.rows or 0), *part.shape[1:]), part.dtype)
        elif end > len(self.values):
            # The new room is touched at once, so it is a sixteenth; the system moves big blocks without a copy.
            self.values.resize((max(end, end + end // 16), *part.shape[1:]), refcheck=False)
        self.values[self.count : end] = part
        self.count = end

    def done(self) -> Array:
        """All rows."""
        if self.count < len(self.values):
            self.values.resize((self.count, *self.values.shape[1:]), refcheck=False)
        return self.values


class _Columns:
    """Columns being filled, batch by batch."""

    def __init__(self, network: Network, keep: str, learned: Array | None, rows: int | None) -> None:
        self.exits, self.gates, self.keep = network.chain.exits, network.chain.gates, keep
        known = network.training_rows()
        own = None if known is None else np.concatenate([known.in_form(FORM), known.rounded])
        some = [digests for digests in (own, learned) if digests is not None]
        self.learned = np.concatenate(some) if some else None
        self.older = None if known is None else known.in_form(1)  # of what a file of the first edition brought
        self.rows = rows
        self.sizes: list[int] = []
        self.columns: dict[str, _Growing] = {}

    def add(self, batch: Batch, state: State) -> None:
        found: dict[str, Array] = {"row": batch.row, "digest": batch.digest}
        if self.older is not None and self.older.size:
            found[OLDER] = digests_of(batch.x, form=1)
        classes = self._classes(state)
        if batch.y is not None:
            _check_labels(batch.y, batch.row, classes)
            found["label"] = batch.y
        for name in self.exits:
            logits = state[name + LOGITS].float().cpu().numpy()
            found[f"answer/{name}"] = logits.argmax(1)
            if self.keep == "logits":
                found[f"logits/{name}"] = logits
        last = self.exits[-1]
        other = state[last] is not state[last + LOGITS] and state[last].shape == state[last + LOGITS].shape
        if other and last != BACKBONE:  # of a cut model that column is its last exit's, whatever the exit is
            plain = state[last].float().cpu().numpy()  # the exit answers otherwise than the model that it stands on
            found |= {f"answer/{BACKBONE}": plain.argmax(1)} | (
                {f"logits/{BACKBONE}": plain} if self.keep == "logits" else {}
            )
        _check_finite(state[self.exits[-1] + LOGITS], batch.row, self.exits[-1])
        for name in self.gates:
            found[f"score/{name}"] = state[name + SCORE].cpu().numpy()
        for name, column in found.items():
            self.columns.setdefault(name, _Growing(self.rows)).add(column)
        self.sizes.append(len(batch))

    def _classes(self, state: State) -> int:
        widths = {name: int(state[name + LOGITS].shape[1]) for name in self.exits}
        if len(set(widths.values())) > 1:
            raise BadNetwork(f"the exits have different numbers of classes ({widths}), expected one; check the rungs")
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
            parts = [] if own is None else np.split(own, np.cumsum(self.sizes)[:-1])
            found[name] = np.concatenate(processes.woven(parts))
        older = found.pop(OLDER, None)
        if self.learned is not None and found:  # once: every look-up sorts all rows that taught
            found["learned"] = np.isin(found["digest"], self.learned)
            if older is not None and self.older is not None:
                found["learned"] |= np.isin(older, self.older)
        return found


def _check_labels(y: Array, row: Array, classes: int) -> None:
    bad = np.flatnonzero((y < 0) | (y >= classes))
    if bad.size:
        raise BadData(
            f"{bad.size} labels lie outside 0 to {classes - 1} (row {row[bad[0]]} has {y[bad[0]]}); the network has "
            f"{classes} classes: give the data set that it was trained for"
        )


def _check_finite(logits: Tensor, row: Array, exit_: str) -> None:
    bad = np.flatnonzero(~logits.isfinite().all(1).cpu().numpy())
    if bad.size:
        some = ", ".join(map(str, row[bad[:10]])) + (" ..." if bad.size > 10 else "")
        raise BadData(
            f"the answers of exit {exit_!r} are not finite for rows {some}; look for NaN or infinities in these rows "
            "and leave them out"
        )


def _trace(network: Network, source: Rows, columns: dict[str, Array], engine: str, probe: Probe) -> Trace:
    header = Header(
        chain=network.chain,
        reference=network.chain.exits[-1],
        classes=len(probe.logits[-1][0]),
        data=source.name,
        data_fingerprint=fingerprint_of(columns["digest"]),
        origin=Origin(network.fingerprint(), engine, network.precision(), probe),
        class_names=source.class_names,
        taught=not network.untaught(),
    )
    return Trace(columns, header)


def _probe(network: Network, inputs: tuple[Input, ...], parts: Sequence[Part]) -> Probe:
    blank = Probe(inputs, 0, (((),) * PROBE_ROWS,))
    state = _everything(parts, as_inputs(blank.batch(), network.device()))
    logits = [state[name + LOGITS].float().cpu().tolist() for name in network.chain.exits]
    return replace(blank, logits=tuple(tuple(tuple(row) for row in rows_) for rows_ in logits))
