"""Other gates on a network that is trained: its exits answer as before, and only scores and what
gates read differ.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import torch

from offramp.building.factories import make_gate
from offramp.data.rows import Rows
from offramp.networks.network import Network
from offramp.networks.nodes import Seen, grade
from offramp.plans.columns import Array
from offramp.plans.plan import BAND
from offramp.plans.trace import Trace
from offramp.runtime.recording import record

# of a recording that tells what other gates cost, and whether their scores come from logits alone
ROWS = 64


def regated(network: Network, gate: str) -> Network:
    """The same models and exits under another gate at every node. Raises UnknownName,
    InvalidArgument.
    """
    names = network.topology.exits
    gates = {
        name: make_gate(gate, names[: network.topology.exit_index(name)])
        for name in network.topology.gates
    }
    return network.with_gates(gates)


def rescored(trace: Trace, network: Network, source: Rows, engine: str) -> Trace:
    """The trace that recording `network` would give, where `trace` has the same exits' logits for
    the same rows.

    A gate that looks at logits alone is asked about those of the trace; the first rows are recorded
    to tell its cost, and to compare. One that looks at features, or has a say in another trace's
    scores, is recorded on all rows.
    """
    few = source.select(slice(0, min(ROWS, len(trace))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the trace was recorded
        first = record(network, few, timed=False, engine=engine, progress=False)
        scores = _scores(trace, network)
        if scores is None or not _same(first, scores):
            return record(network, source, timed=False, engine=engine, progress=False)
    costs = {name: column for name, column in first.columns.items() if name.startswith("cost/")}
    kept = {
        name: column
        for name, column in trace.columns.items()
        if not name.startswith(("cost/", "score/"))
    }
    # the largest logit is of all rows, and not of the few
    origin = replace(first.header.origin, largest_logit=trace.header.origin.largest_logit)
    header = replace(
        trace.header, topology=network.topology, origin=origin, scores=first.header.scores
    )
    return Trace({**kept, **scores, **costs}, header)


def _scores(trace: Trace, network: Network) -> dict[str, Array] | None:
    """The columns of scores from logits alone; None where a gate asks for more than there is."""
    logits = {
        name: torch.from_numpy(trace.columns[f"logits/{name}"]) for name in trace.topology.exits
    }
    scores = {}
    with torch.inference_mode():
        for name in network.topology.gates:
            own = logits[name]
            try:
                scores[f"score/{name}"] = grade(
                    network.gate_of(name), Seen(own, logits, own), own
                ).numpy()
            except Exception:  # a user's gate may fail in any way where its features are missing
                return None
    return scores


def _same(first: Trace, scores: dict[str, Array]) -> bool:
    """Whether the scores of the first rows are those that were recorded."""
    return all(
        np.allclose(first.columns[name], column[: len(first)], rtol=1e-4, atol=BAND, equal_nan=True)
        for name, column in scores.items()
    )
