"""A schedule lowered to one graph: its stages, gates, compaction and order inside, one call a
batch.

    first stage -> score >= threshold? -> If some rows stay: gather them, run the rest, scatter
                                          If none stays: nothing else runs

The graph gives `logits` [B, C] and `code` [B]: how many gates a row has passed, and above that
`NAN_CODE` for each gate whose score was NaN. Which exit answered and why follows from the number.
At batch 1 every node takes about a microsecond, so that a row which leaves at the first gate passes
six of ours.

Shapes: B rows handed in, n rows still here, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.errors import BadNetwork
from offramp.networks.inputs import State, given
from offramp.networks.network import LOGITS, SCORE, EngineStage, Network
from offramp.plans.schedule import Schedule
from offramp.plans.signature import INPUT
from offramp.plans.trace import WHY
from offramp.runtime.graphs import graphs_of, kept_graph, network_marks
from offramp.runtime.lean import Array, LeanChain, Run, expected
from offramp.runtime.onnx_graphs import Graph
from offramp.runtime.outputs import GATE, Outputs, Tensors

MOST_BYTES = 2**31 - 1  # of one protobuf message
NAN_CODE = 2**32
OUTPUTS = ("logits", "code")


@dataclass
class Body:
    """Nodes and weights of a graph being written."""

    nodes: list[Any] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)

    def add(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """A node with one output; its name comes back."""
        from onnx import helper

        self.nodes.append(
            helper.make_node(kind, [*inputs], [output], name=f"offramp {output}", **attributes)
        )
        return output

    def constant(self, name: str, value: Any) -> str:
        """A weight; its name comes back."""
        from onnx import numpy_helper

        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def graph(self, name: str, outputs: Sequence[str], kinds: Sequence[int]) -> Any:
        """All of it as one graph, or as the branch of an `If`."""
        from onnx import helper

        ends = [
            helper.make_tensor_value_info(end, kind, None)
            for end, kind in zip(outputs, kinds, strict=True)
        ]
        return helper.make_graph(self.nodes, name, [], ends, self.weights)


@dataclass(frozen=True)
class _Written:
    """A stage as a graph.

    Attributes:
        name: of the stage.
        graph: its segment, exit and gate.
        threshold: of its gate; None without one.
        carries: names of what later stages read.
        last: whether all rows end here.
    """

    name: str
    graph: Graph
    threshold: float | None
    carries: tuple[str, ...]
    last: bool


def lowered(
    network: Network, schedule: Schedule, parts: Sequence[EngineStage], rows: State
) -> Graph:
    """A schedule as one graph.

    Args:
        network: whose schedule it is.
        schedule: with a gate that is open.
        parts: the same, opened on the engine, and compiled.
        rows: named inputs [B, ...] such as will be served.

    Raises:
        BadNetwork: it cannot be expressed; the sentence says why.
    """
    require_lowerable(network, parts)
    shapes = [(name, str(value.dtype), tuple(value.shape[1:])) for name, value in rows.items()]
    stages = [(part.stage.nodes, part.stage.thresholds, part.writes) for part in parts]
    key = f"one graph {network_marks(network)()} {stages} {shapes}"
    return kept_graph(key, lambda: _lowered(network, schedule, parts, rows))


def _lowered(
    network: Network, schedule: Schedule, parts: Sequence[EngineStage], rows: State
) -> Graph:
    tried = {name: value[:4].clone() for name, value in rows.items()}
    inputs = tuple(rows)
    written = list[_Written]()
    answers = list[Tensor]()
    with torch.inference_mode():
        for part, graph in zip(parts, graphs_of(network, schedule, tried), strict=True):
            part.call(tried)
            stage = part.stage
            carries = list[str]()
            for name in stage.edges[-1].carries:
                carries += inputs if name == INPUT else [name]
            limit = float(np.float32(stage.thresholds[0])) if stage.gate else None
            written.append(_Written(part.name, graph, limit, tuple(carries), stage.last))
            if stage.exit and (stage.gate or stage.last):
                answers.append(tried[part.name + LOGITS])
    if len({(value.dtype, value.shape[1:]) for value in answers}) != 1:
        raise BadNetwork("its exits answer in different types or numbers of classes")
    return _joined(written, answers[0])


def require_lowerable(network: Network, parts: Sequence[EngineStage]) -> None:
    """Raise BadNetwork with the reason why a schedule is no single graph."""
    if not network.topology.is_chain or network.topology.defaults:
        raise BadNetwork("it has forks")
    if not any(part.stage.gate for part in parts):
        raise BadNetwork("the plan asks no gate")
    for part in parts:
        if not expected(part.stage):
            raise BadNetwork(f"gate {part.name!r} chooses among more than leaving and going on")


def _joined(stages: Sequence[_Written], logits: Tensor) -> Graph:
    from onnx import TensorProto, helper

    models = [stage.graph.model for stage in stages]
    size = sum(model.ByteSize() for model in models)
    if size > MOST_BYTES:
        raise BadNetwork(f"its graphs take {size / 1e9:.1f} GB, and one graph holds at most 2")
    versions = {(one.domain, one.version) for model in models for one in model.opset_import}
    if len({domain for domain, _ in versions}) != len(versions):
        raise BadNetwork("its graphs are written in different versions of ONNX")
    number = {
        torch.float32: TensorProto.FLOAT,
        torch.float64: TensorProto.DOUBLE,
        torch.float16: TensorProto.FLOAT16,
    }
    if logits.dtype not in number:
        raise BadNetwork(f"its answers are {str(logits.dtype).removeprefix('torch.')}")
    body = Body()
    ends = _rest(body, stages, {}, (number[logits.dtype], TensorProto.INT64))
    for end, output in zip(ends, OUTPUTS, strict=True):
        body.add("Identity", [end], output)
    graph = body.graph("offramp", OUTPUTS, (number[logits.dtype], TensorProto.INT64))
    known = dict[str, Any]()
    given = {name for stage in stages for name in stage.graph.writes}
    for model in models:
        for value in model.graph.input:
            if value.name not in given:
                known.setdefault(value.name, value)
    graph.input.extend(known.values())
    whole = helper.make_model(
        graph, opset_imports=models[0].opset_import, ir_version=models[0].ir_version
    )
    return Graph(stages[-1].name, tuple(known), OUTPUTS, whole)


def _rest(
    body: Body, stages: Sequence[_Written], scope: Mapping[str, str], kinds: Sequence[int]
) -> tuple[str, str]:
    """Write the stages from `stages[0]` on into `body`.

    Args:
        body: where they are written.
        stages: of the chain.
        scope: the names that tensors have here, where rows were gathered.
        kinds: the types of logits and codes.

    Returns:
        The names of the logits [n, C] and codes [n] of the rows here.
    """
    from onnx import TensorProto

    stage = stages[0]
    later = stages[1:]
    name = stage.name
    graph = stage.graph.renamed(scope).graph
    body.nodes += graph.node
    body.weights += graph.initializer
    if stage.last:
        return name + LOGITS, _zeros(body, name)
    if stage.threshold is None:
        return _rest(body, later, scope, kinds)
    limit = body.constant(f"{name}::threshold", np.float32(stage.threshold))
    # of NaN it is false
    reached = body.add("GreaterOrEqual", [name + SCORE, limit], f"{name}::reached")
    stay = body.add("Not", [reached], f"{name}::stay")  # [n] bool
    code = body.add("Cast", [stay], f"{name}::code", to=TensorProto.INT64)  # [n]: 0 leaves, 1 stays
    most = body.add("ReduceMax", [code], f"{name}::most", keepdims=0)
    some = body.add("Cast", [most], f"{name}::some", to=TensorProto.BOOL)
    goes = Body()
    ends = Body()
    axis = goes.constant(f"{name}::axis", np.array([0]))
    index = goes.add(
        "Squeeze", [goes.add("NonZero", [stay], f"{name}::where"), axis], f"{name}::index"
    )  # [m]
    inner = dict(scope)
    for key in stage.carries:
        inner[key] = goes.add("Gather", [scope.get(key, key), index], f"{name}::{key}", axis=0)
    logits, codes = _rest(goes, later, inner, kinds)
    # A row that goes on has passed one gate more, and is marked if the score was NaN.
    bad = goes.add("IsNaN", [name + SCORE], f"{name}::bad")
    one = goes.constant(f"{name}::1", np.int64(1))
    marked = goes.constant(f"{name}::nan", np.int64(1 + NAN_CODE))
    more = goes.add("Where", [bad, marked, one], f"{name}::more")  # [n]
    more = goes.add("Gather", [more, index], f"{name}::more here", axis=0)  # [m]
    codes = goes.add("Add", [codes, more], f"{name}::codes")
    last = goes.constant(f"{name}::last axis", np.array([1]))
    places = goes.add("Unsqueeze", [index, last], f"{name}::places")  # [m, 1]
    found = (
        goes.add("ScatterND", [name + LOGITS, places, logits], f"{name}::both logits"),
        goes.add("ScatterND", [code, places, codes], f"{name}::both codes"),
    )
    done = (
        ends.add("Identity", [name + LOGITS], f"{name}::all logits"),
        ends.add("Identity", [code], f"{name}::all codes"),
    )
    from onnx import helper

    branch = goes.graph(f"{name} goes on", found, kinds)
    other = ends.graph(f"{name} ends", done, kinds)
    outputs = (f"{name}::logits", f"{name}::passed")
    node = helper.make_node(
        "If", [some], [*outputs], name=f"{name}::if", then_branch=branch, else_branch=other
    )
    body.nodes.append(node)
    return outputs


def _zeros(body: Body, name: str) -> str:
    """Zeros [n], one for each row of the last stage."""
    shape = body.add("Shape", [name + LOGITS], f"{name}::shape", start=0, end=1)
    return body.add("ConstantOfShape", [shape], f"{name}::code", value=_int_zero())


def _int_zero() -> Any:
    from onnx import numpy_helper

    return numpy_helper.from_array(np.zeros(1, np.int64))


class OneGraph:
    """A schedule in one call: x -> Answers, or None for what the Runner has to look at."""

    def __init__(self, run: Run, lean: LeanChain, parts: Sequence[EngineStage]) -> None:
        """Take the call.

        Args:
            run: logits and codes of inputs by name.
            lean: the same schedule in parts.
            parts: of the schedule.
        """
        self._run = run
        self._lean = lean
        answering = [part.stage for part in parts if part.stage.gate or part.stage.last]
        self._places = np.array([lean.exits.index(stage.name) for stage in answering])
        self._why = np.array([GATE if stage.gate else WHY.index(stage.why) for stage in answering])

    def __call__(self, x: Any) -> Outputs | None:
        """Answers for x [B, ...]. Raises whatever the engine raises."""
        state = self._lean.bound(x)
        if state is None:
            return None
        count = len(next(iter(state.values())))
        if not count:
            return None
        logits, codes = self._run(state)
        return Coded(logits, codes, self._places, self._why, self._lean.exits)


class Coded(Outputs):
    """Answers as one graph gives them: tensors are made when somebody asks for one of them."""

    def __init__(
        self, logits: Array, codes: Array, places: Array, why: Array, exits: tuple[str, ...]
    ) -> None:
        """Keep logits [B, C] and codes [B]; by the number of gates passed which exit answered, and
        why.
        """
        self._exits = exits
        self._found = (logits, codes, places, why)

    @cached_property
    def _tensors(self) -> Tensors:  # type: ignore[override]
        logits, codes, places, why = self._found
        passed = codes % NAN_CODE
        reasons = why[passed]
        flags = codes >= NAN_CODE
        # what left at a gate had a score, so its logits were finite
        ended = np.flatnonzero(reasons != GATE)
        flags[ended] |= ~np.isfinite(logits[ended].astype(np.float32, copy=False)).all(-1)
        found = [torch.from_numpy(array) for array in (logits, places[passed], reasons, flags)]
        return found[0], found[1], found[2], found[3]


def farthest(
    graph: OneGraph, lean: LeanChain, parts: Sequence[EngineStage], rows: State, band: float
) -> float:
    """How far the logits of one graph lie from those of the parts, on rows that take the same way.

    Args:
        graph: the schedule in one call.
        lean: the same in parts.
        parts: of the schedule.
        rows: named inputs [B, ...].
        band: logits may differ by it, or by a tenth of it times the largest; a row whose score
            lies within it of a threshold may take the other way.

    Returns:
        The largest distance.

    Raises:
        BadNetwork: something differs by more.
    """
    x = given(rows)
    mine = graph(x)
    its = lean(x)
    if mine is None or its is None:
        return 0.0
    same = (mine.exit == its.exit).numpy()
    if not same.all():
        state = {name: value[~same] for name, value in rows.items()}
        close = np.zeros(int((~same).sum()), bool)
        with torch.inference_mode():
            for part in parts:
                part.call(state)
                if part.stage.gate:
                    scores = state[part.name + SCORE].numpy()
                    close |= np.abs(scores - np.float32(part.stage.thresholds[0])) <= band
        if not close.all():
            raise BadNetwork(f"{int((~close).sum())} of {len(same)} rows take another way in it")
    if not (mine.flagged == its.flagged).numpy()[same].all():
        raise BadNetwork("it flags other rows")
    ours = mine.logits.numpy()[same]
    wanted = its.logits.numpy()[same]
    sound = np.isfinite(wanted)
    if (sound != np.isfinite(ours)).any():
        raise BadNetwork("its answers are finite where others are not")
    if not sound.any():
        return 0.0
    far = float(np.abs(ours[sound] - wanted[sound]).max())
    if not far <= band * max(1.0, float(np.abs(wanted[sound]).max()) / 10):
        raise BadNetwork(f"its logits lie {far:.2g} away from those of the parts")
    return far
