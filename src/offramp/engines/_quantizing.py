"""Graphs in eight bits: weights, and activations with scales that are fixed beforehand.

If the scales followed each batch (ONNX Runtime's dynamic quantisation), the score of a row would
depend on the other rows, which no gate allows. So the scales are fixed, and some rows set them.
With a plan, only the rows that reach a segment under this plan, computed in float32, set its
scales. Easy rows, which leave before it, need not fit into them. Exits and gates stay in float32.
Weights have a scale per channel and seven bits, because processors without eight-bit dot products
add in sixteen bits and would overflow.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offramp.data.rows import Rows, rows
from offramp.errors import BadData, BadNetwork
from offramp.networks.inputs import State, as_inputs, count_of
from offramp.networks.network import HANDED, LOGITS, SCORE, Network
from offramp.plans.plan import Plan
from offramp.plans.schedule import full_schedule
from offramp.runtime.engine import kind_of
from offramp.runtime.onnx_graphs import Graph
from offramp.runtime.running import Runner

BATCH = 32
MOST = 2000  # rows that may set scales
LEAST = 8  # rows that must reach a segment to set its scales alone

Array = np.ndarray[Any, np.dtype[Any]]


@cache
def scaling_rows(text: str) -> Rows:
    """Read the rows of a spec such as digits[0:200]. Raises BadData or BadFile."""
    source = rows(text)
    if source.length is None or len(source) > MOST:
        count = source.length or "an unknown number of"
        raise BadData(
            f"int8 must have 1 to {MOST} rows that set scales, got {source.name} with {count} "
            f"rows. Use some of them, as in digits[0:500]"
        )
    return source


@cache
def reaching_plan(file: str) -> Plan:
    """Load the plan in a file of `Plan.save`. Raises BadFile."""
    return Plan.load(file)


def plan_mark(plan: Plan) -> str:
    """A digest of thresholds and latest exit, which decide which rows reach a segment."""
    thresholds = dict[str, tuple[str, ...]]()
    for gate in sorted(plan.thresholds):
        thresholds[gate] = tuple(value.hex() for value in plan.thresholds[gate])
    described = f"{thresholds} {plan.max_exit}"
    return hashlib.sha256(described.encode()).hexdigest()[:16]


class Quantizer:
    """Turns float32 graphs of a network into eight-bit graphs.

    It does not keep the network alive, because the network keeps its graphs.

    Args:
        network: the network of the graphs.
        source: rows that set the scales.
        plan: only rows that reach a segment under this plan set its scales; None for all rows.
    """

    def __init__(self, network: Network, source: Rows, plan: Plan | None = None) -> None:
        self.network = weakref.ref(network)
        self.source = source
        self.plan = plan
        self._reached: dict[str, Array] | None = None

    def reached(self, node: str) -> Array | None:
        """Which of the rows [N] set the scales of a node; None for all of them.

        If fewer than LEAST rows reach the node, all rows set its scales. This includes segments
        that the plan never runs, because `anytime` runs them.
        """
        if self.plan is None:
            return None
        if self._reached is None:
            network = self.network()
            assert network is not None, "its stages outlive the network"
            self._reached = _reached(network, self.source, self.plan)
        arrived = self._reached[node]
        if arrived.sum() < LEAST:
            return None
        return arrived

    def __call__(self, graph: Graph) -> Graph:
        """The graph with the operations of its segment in eight bits. Raises BadNetwork."""
        import onnx
        from onnxruntime import quantization

        network = self.network()
        assert network is not None, "its stages outlive the network"
        with tempfile.TemporaryDirectory() as folder, _quiet():
            float_path = Path(folder) / "float.onnx"
            prepared_path = Path(folder) / "prepared.onnx"
            int8_path = Path(folder) / "int8.onnx"
            try:
                onnx.save(graph.model, float_path)
                quantization.shape_inference.quant_pre_process(
                    float_path, prepared_path, skip_symbolic_shape=True
                )
                prepared = replace(graph, model=onnx.load(prepared_path))
                quantization.quantize_static(
                    prepared_path,
                    int8_path,
                    _Reader(network, self.source, graph.reads, self.reached(graph.node)),
                    quant_format=quantization.QuantFormat.QDQ,
                    activation_type=quantization.QuantType.QUInt8,
                    weight_type=quantization.QuantType.QInt8,
                    per_channel=True,
                    reduce_range=True,
                    nodes_to_exclude=_outside_the_segment(prepared),
                )
            except Exception as problem:  # onnxruntime raises anything
                lines = str(problem).strip().splitlines() or [type(problem).__name__]
                raise BadNetwork(
                    f"segment {graph.node!r} cannot be written in eight bits: {lines[0][:200]}. "
                    "Leave int8 out"
                ) from problem
            return replace(graph, model=onnx.load(int8_path))


def _reached(network: Network, source: Rows, plan: Plan) -> dict[str, Array]:
    """By node, which of the rows [N] reach it under a plan, computed in float32 on torch."""
    torch_engine = kind_of("torch")()
    device = network.device()
    engine_stages = torch_engine.open(network, plan.schedule(network.topology), device)
    all_stages = torch_engine.open(network, full_schedule(network.topology), device)
    runner = Runner(network, plan, engine_stages, all_stages, None)
    by_node: dict[str, list[Array]] = {name: [] for name in network.topology.names}
    for batch in source.batches(BATCH):
        _, observed = runner.observed(batch.x, 0.0)
        for name, arrived in observed.ran.items():
            by_node[name].append(arrived)
    return {name: np.concatenate(parts) for name, parts in by_node.items()}


class _Reader:
    """The inputs of a graph for the rows that set the scales, batch by batch.

    torch computes them in float32. onnxruntime calls `get_next`.

    Args:
        network: the network of the graph.
        source: the rows.
        reads: names of the tensors that the graph reads.
        chosen: which of the rows [N] set the scales; None for all of them.
    """

    def __init__(
        self, network: Network, source: Rows, reads: tuple[str, ...], chosen: Array | None
    ) -> None:
        self.batches = self._inputs(network, source, reads, chosen)

    def get_next(self) -> dict[str, Array] | None:
        """The next batch; None after the last."""
        return next(self.batches, None)

    @staticmethod
    def _inputs(
        network: Network, source: Rows, reads: tuple[str, ...], chosen: Array | None
    ) -> Iterator[dict[str, Array]]:
        schedule = full_schedule(network.topology)
        engine_stages = kind_of("torch")().open(network, schedule, network.device())
        start = 0
        for batch in source.batches(BATCH):
            state: State = as_inputs(batch.x)
            count = count_of(state)
            # which rows of this batch set the scales, [B]
            here = np.ones(count, bool)
            if chosen is not None:
                here = chosen[start : start + count]
            start += count
            if not here.any():
                continue
            # Run stages only until everything that the graph reads has been computed.
            with torch.inference_mode():
                for engine_stage in engine_stages:
                    if set(reads) <= state.keys():
                        break
                    engine_stage.call(state)
            yield {name: state[name].numpy()[here] for name in reads}  # [B, ...] -> [n, ...]


def _outside_the_segment(graph: Graph) -> list[str]:
    """The names of the operations that only the exit or the gate needs."""
    # The operations of the segment are those that its own outputs need.
    segment_writes = list[str]()
    for name in graph.writes:
        if not name.endswith((LOGITS, SCORE, HANDED)):
            segment_writes.append(name)
    segment = graph.only(segment_writes).model.graph
    inside = {node.name for node in segment.node}
    outside = list[str]()
    for node in graph.model.graph.node:
        if node.name not in inside:
            outside.append(node.name)
    return outside


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings that onnxruntime logs."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
