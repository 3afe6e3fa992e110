"""Graphs in eight bits: weights, and activations on scales that some rows fix beforehand.

If the scales followed each batch (ONNX Runtime's dynamic quantisation), the score of a row would
depend on the other rows, which no gate allows. So the scales are fixed, and rows are needed to set
them. Exits and gates stay in float32. Weights have a scale per channel and seven bits, because
processors without eight-bit dot products add up in sixteen bits and would overflow.
"""

from __future__ import annotations

import contextlib
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
from offramp.networks.inputs import State, as_inputs
from offramp.networks.network import HANDED, LOGITS, SCORE, Network
from offramp.plans.schedule import full_schedule
from offramp.runtime.engine import kind_of
from offramp.runtime.onnx_graphs import Graph

BATCH = 32
MOST = 2000  # rows that may set scales

Array = np.ndarray[Any, np.dtype[Any]]


@cache
def scaling_rows(text: str) -> Rows:
    """The rows of a spec such as digits[0:200]. Raises BadData, BadFile."""
    source = rows(text)
    if source.length is None or len(source) > MOST:
        raise BadData(
            f"int8 must have 1 to {MOST} rows that set scales, got {source.name} with "
            f"{source.length or 'an unknown number of'} rows. Use some of them, as in digits[0:500]"
        )
    return source


class Quantizer:
    """Turns float32 graphs of a network into eight-bit graphs.

    It does not keep the network alive, because the network keeps its graphs.

    Args:
        network: whose graphs they are.
        source: rows that set the scales.
    """

    def __init__(self, network: Network, source: Rows) -> None:
        self.network = weakref.ref(network)
        self.source = source

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
                    _Reader(network, self.source, graph.reads),
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


class _Reader:
    """The inputs of a graph for the rows that set the scales, batch by batch.

    torch computes them in float32. onnxruntime calls `get_next`.
    """

    def __init__(self, network: Network, source: Rows, reads: tuple[str, ...]) -> None:
        self.batches = self._inputs(network, source, reads)

    def get_next(self) -> dict[str, Array] | None:
        """The next batch; None after the last."""
        return next(self.batches, None)

    @staticmethod
    def _inputs(
        network: Network, source: Rows, reads: tuple[str, ...]
    ) -> Iterator[dict[str, Array]]:
        schedule = full_schedule(network.topology)
        engine_stages = kind_of("torch")().open(network, schedule, network.device())
        for batch in source.batches(BATCH):
            state: State = as_inputs(batch.x)
            # Run stages only until everything that the graph reads has been computed.
            with torch.inference_mode():
                for engine_stage in engine_stages:
                    if set(reads) <= state.keys():
                        break
                    engine_stage.call(state)
            yield {name: state[name].numpy() for name in reads}


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
