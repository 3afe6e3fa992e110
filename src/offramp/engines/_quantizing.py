"""A node's graph in eight bits: weights, and activations on scales that are fixed beforehand by
some rows.

Scales that follow a batch (ONNX Runtime's dynamic quantisation) would let a row's score depend on
the rows beside it, which no gate may: so the scales are fixed, and need rows. Exits and gates stay
in float32. Weights have a scale per channel and seven bits, because processors without eight-bit
dot products add up in sixteen bits and would overflow.
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
MOST = 2000  # rows that are looked at for scales

Array = np.ndarray[Any, np.dtype[Any]]


@cache
def scaling_rows(text: str) -> Rows:
    """The rows of a spec such as digits[0:200]. Raises BadData, BadFile."""
    found = rows(text)
    if found.length is None or len(found) > MOST:
        raise BadData(
            f"{found.name} has {found.length or 'unknown'} rows, expected 1 to {MOST} that set "
            f"scales; choose, as in "
            "digits[0:500]"
        )
    return found


class Quantizer:
    """Makes eight-bit graphs of a network's float32 ones. It does not keep the network, which keeps
    what it made.
    """

    def __init__(self, network: Network, source: Rows) -> None:
        self.network = weakref.ref(network)
        self.source = source

    def __call__(self, graph: Graph) -> Graph:
        """The same node with the operations of its segment in eight bits. Raises BadNetwork where
        that fails.
        """
        import onnx
        from onnxruntime import quantization

        network = self.network()
        assert network is not None, "its parts outlive the network"
        with tempfile.TemporaryDirectory() as folder, _quiet():
            given, plain, done = (
                Path(folder) / f"{name}.onnx" for name in ("given", "plain", "int8")
            )
            try:
                onnx.save(graph.model, given)
                quantization.shape_inference.quant_pre_process(
                    given, plain, skip_symbolic_shape=True
                )
                quantization.quantize_static(
                    plain,
                    done,
                    _Reader(network, self.source, graph.reads),
                    quant_format=quantization.QuantFormat.QDQ,
                    activation_type=quantization.QuantType.QUInt8,
                    weight_type=quantization.QuantType.QInt8,
                    per_channel=True,
                    reduce_range=True,
                    nodes_to_exclude=_beside_the_segment(replace(graph, model=onnx.load(plain))),
                )
            except Exception as problem:  # what onnxruntime cannot quantise raises anything
                brief = str(problem).strip().splitlines() or [type(problem).__name__]
                raise BadNetwork(
                    f"segment {graph.node!r} cannot be written in eight bits: {brief[0][:200]}; "
                    f"run it without int8"
                ) from problem
            return replace(graph, model=onnx.load(done))


class _Reader:
    """What a graph reads for the rows that set the scales, a batch at a time; computed by torch in
    float32.
    """

    def __init__(self, network: Network, source: Rows, reads: tuple[str, ...]) -> None:
        self.batches = self._made(network, source, reads)

    def get_next(self) -> dict[str, Array] | None:
        """The next batch, None after the last: the form that onnxruntime asks for."""
        return next(self.batches, None)

    @staticmethod
    def _made(network: Network, source: Rows, reads: tuple[str, ...]) -> Iterator[dict[str, Array]]:
        schedule = full_schedule(network.topology)
        engine_stages = kind_of("torch")().open(network, schedule, network.device())
        for batch in source.batches(BATCH):
            state: State = as_inputs(batch.x)
            with torch.inference_mode():
                for engine_stage in engine_stages:
                    if set(reads) <= state.keys():
                        break
                    engine_stage.call(state)
            yield {name: state[name].numpy() for name in reads}


def _beside_the_segment(graph: Graph) -> list[str]:
    """The names of the operations that only the exit or the gate needs."""
    own = [name for name in graph.writes if not name.endswith((LOGITS, SCORE, HANDED))]
    inside = {node.name for node in graph.only(own).model.graph.node}
    return [node.name for node in graph.model.graph.node if node.name not in inside]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep to ourselves what it says to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
