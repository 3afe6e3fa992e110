"""Other gates on a trained network: its exits stay the same, only the scores differ."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from offramp.building.factories import make_gate
from offramp.data.rows import Rows
from offramp.networks.network import Network
from offramp.networks.nodes import Gate, Seen, grade
from offramp.plans.columns import Array
from offramp.plans.plan import BAND
from offramp.plans.trace import Trace
from offramp.runtime.recording import record

# The rows of a short recording. It measures the cost of other gates, and shows whether their scores
# come from logits alone.
ROWS = 64


def regated(network: Network, gate: str) -> Network:
    """The same models and exits with another gate at every node.

    Args:
        network: that is trained.
        gate: the name of the gate.

    Raises:
        UnknownName: there is no gate of this name.
        InvalidArgument: its arguments are wrong.
    """
    names = network.topology.exits
    gates = dict[str, Gate]()
    for name in network.topology.gates:
        before = names[: network.topology.exit_index(name)]
        gates[name] = make_gate(gate, before)
    return network.with_gates(gates)


def rescored(trace: Trace, network: Network, source: Rows, engine: str) -> Trace:
    """The trace of a network that differs from a recorded one only in its gates.

    The scores of a gate that reads only logits are computed from those of the trace. The first rows
    are recorded for its cost, and to check the scores. For any other gate all rows are recorded.

    Args:
        trace: of the same exits on the same rows.
        network: with other gates.
        source: the rows of the trace.
        engine: the name of the engine that records.

    Returns:
        The same trace as `record(network, source)`.
    """
    few = source.select(slice(0, min(ROWS, len(trace))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were printed when the trace was recorded
        first = record(network, few, timed=False, engine=engine, progress=False)
        scores = _scores(trace, network)
        if scores is None or not _are_recorded(first, scores):
            return record(network, source, timed=False, engine=engine, progress=False)
    # Costs are those of the new gates, scores were computed, all else is as it was.
    columns = dict[str, Array]()
    for name, column in trace.columns.items():
        if not name.startswith(("cost/", "score/")):
            columns[name] = column
    columns.update(scores)
    for name, column in first.columns.items():
        if name.startswith("cost/"):
            columns[name] = column
    # The largest logit is that of all rows, not of the few.
    origin = replace(first.header.origin, largest_logit=trace.header.origin.largest_logit)
    header = replace(
        trace.header, topology=network.topology, origin=origin, scores=first.header.scores
    )
    return Trace(columns, header)


def _scores(trace: Trace, network: Network) -> dict[str, Array] | None:
    """The columns of scores from logits alone, or None if a gate reads something else."""
    logits = dict[str, Tensor]()
    for name in trace.topology.exits:
        logits[name] = torch.from_numpy(trace.columns[f"logits/{name}"])  # [N, C]
    scores = dict[str, Array]()
    with torch.inference_mode():
        for name in network.topology.gates:
            own = logits[name]
            # The logits take the place of the features, which a trace does not have. A user's gate
            # that needs features may fail in any way.
            try:
                score = grade(network.gate_of(name), Seen(own, logits, own), own)
                scores[f"score/{name}"] = score.numpy()
            except Exception:
                return None
    return scores


def _are_recorded(first: Trace, scores: dict[str, Array]) -> bool:
    """Whether the computed scores of the first rows are the recorded ones."""
    for name, column in scores.items():
        recorded = first.columns[name]
        computed = column[: len(first)]
        if not np.allclose(recorded, computed, rtol=1e-4, atol=BAND, equal_nan=True):
            return False
    return True
