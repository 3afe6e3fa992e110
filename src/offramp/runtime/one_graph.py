"""Writes a whole schedule as one graph, which answers a batch in one call.

    first stage -> score >= threshold?
        If some rows stay: gather them, run the rest of the network, scatter the results
        Otherwise:         nothing else runs

The rest of the network has the same form, so each gate is an `If` inside the one before it. The
graph returns `logits` [B, C] and `code` [B]. A code counts the gates that the row has passed, plus
`NAN_CODE` for each gate whose score was NaN. The exit that answered, and the reason, follow from
this number. With a guard, a third output is not finite if a tensor that a stage reads is not. At
batch 1 every node of a graph takes about a microsecond. A row that leaves at the
first gate passes six nodes that are not in the network.

Shapes: B rows in x, n rows at a stage, m rows that go on from there, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.errors import BadNetwork
from offramp.networks.inputs import State, count_of, given
from offramp.networks.network import LOGITS, SCORE, EngineStage, Network
from offramp.plans.replay import WHY
from offramp.plans.schedule import Schedule
from offramp.plans.signature import INPUT
from offramp.runtime.graphs import graphs_of, kept_graph, network_marks
from offramp.runtime.lean import Array, LeanChain, expected
from offramp.runtime.onnx_graphs import Graph
from offramp.runtime.outputs import GATE, FromArrays, Outputs, Tensors

MOST_BYTES = 2**31 - 1  # of one protobuf message
NAN_CODE = 2**16  # OpenVINO computes integers in 32 bits
OUTPUTS = ("logits", "code")
GUARD = "guard"

# named arrays -> logits and codes; None for rows that only the stages answer right
OneCall = Callable[[Mapping[str, Array]], Sequence[Array] | None]


@dataclass
class Body:
    """Nodes and weights of a graph that is being written."""

    nodes: list[Any] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)

    def add(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add a node with one output.

        Args:
            kind: the operator.
            inputs: names of the values that it reads.
            output: name of the value that it computes.
            attributes: of the operator.

        Returns:
            The name of the output.
        """
        from onnx import helper

        name = f"offramp {output}"
        node = helper.make_node(kind, [*inputs], [output], name=name, **attributes)
        self.nodes.append(node)
        return output

    def constant(self, name: str, value: Any) -> str:
        """Add a weight. Returns its name."""
        from onnx import numpy_helper

        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def graph(self, name: str, outputs: Sequence[str], kinds: Sequence[int]) -> Any:
        """Make a graph, or the branch of an `If`.

        Args:
            name: of the graph.
            outputs: names of the values that it returns.
            kinds: their types, as numbers of `onnx.TensorProto`.
        """
        from onnx import helper

        ends = list[Any]()
        for output, kind in zip(outputs, kinds, strict=True):
            ends.append(helper.make_tensor_value_info(output, kind, None))
        return helper.make_graph(self.nodes, name, [], ends, self.weights)


@dataclass(frozen=True)
class _Written:
    """A stage as a graph.

    Attributes:
        name: of the stage.
        graph: its segment, exit and gate.
        threshold: of its gate; None without one.
        carries: names of the tensors that later stages read.
        floats: those of them that are floats, but for the inputs, each with its type.
        last: whether all rows end here.
    """

    name: str
    graph: Graph
    threshold: float | None
    carries: tuple[str, ...]
    floats: tuple[tuple[str, torch.dtype], ...]
    last: bool


def lowered(
    network: Network,
    schedule: Schedule,
    engine_stages: Sequence[EngineStage],
    rows: State,
    *,
    guarded: bool = False,
) -> Graph:
    """Write a schedule as one graph.

    Args:
        network: whose schedule it is.
        schedule: with an open gate.
        engine_stages: its stages, opened on the engine and compiled.
        rows: named inputs [B, ...] like those that will be served.
        guarded: for a runtime that loses NaN in activations and comparisons. The graph then has a
            third output, `guard`: a number that is not finite if some stage reads a tensor of an
            earlier one that has a NaN or an infinity. It may also be so without one, where a sum of
            large numbers overflows.

    Raises:
        BadNetwork: the schedule cannot be one graph; the message has the reason.
    """
    require_lowerable(network, engine_stages)
    shapes = [(name, str(value.dtype), tuple(value.shape[1:])) for name, value in rows.items()]
    stages = list[tuple[object, ...]]()
    for engine_stage in engine_stages:
        stage = engine_stage.stage
        stages.append((stage.nodes, stage.thresholds, engine_stage.writes))
    key = f"one graph {network_marks(network)()} {stages} {shapes} {guarded}"
    return kept_graph(key, lambda: _lowered(network, schedule, engine_stages, rows, guarded))


def _lowered(
    network: Network,
    schedule: Schedule,
    engine_stages: Sequence[EngineStage],
    rows: State,
    guarded: bool,
) -> Graph:
    # A few rows run along, because each graph is written for tensors like those that it reads.
    state = {name: value[:4].clone() for name, value in rows.items()}
    graphs = graphs_of(network, schedule, state)
    written = list[_Written]()
    answers = list[Tensor]()
    with torch.inference_mode():
        for engine_stage, graph in zip(engine_stages, graphs, strict=True):
            engine_stage.call(state)
            stage = engine_stage.stage
            carries = list[str]()
            floats = list[tuple[str, torch.dtype]]()
            for name in stage.edges[-1].carries:
                if name == INPUT:  # stands for all inputs
                    carries += rows
                    continue
                carries.append(name)
                if guarded and name not in rows and state[name].is_floating_point():
                    floats.append((name, state[name].dtype))
            threshold = float(np.float32(stage.thresholds[0])) if stage.gate else None
            written.append(
                _Written(
                    engine_stage.name, graph, threshold, tuple(carries), tuple(floats), stage.last
                )
            )
            if stage.exit and (stage.gate or stage.last):
                answers.append(state[engine_stage.name + LOGITS])
    kinds = {(logits.dtype, logits.shape[1:]) for logits in answers}
    if len(kinds) != 1:
        raise BadNetwork("its exits answer in different types or numbers of classes")
    return _joined(written, answers[0], guarded)


def require_lowerable(network: Network, engine_stages: Sequence[EngineStage]) -> None:
    """Raise BadNetwork if a schedule cannot be one graph, with the reason."""
    if not network.topology.is_chain or network.topology.defaults:
        raise BadNetwork("it has forks")
    gates = [engine_stage for engine_stage in engine_stages if engine_stage.stage.gate]
    if not gates:
        raise BadNetwork("the plan has no open gate")
    for engine_stage in engine_stages:
        if not expected(engine_stage.stage):
            raise BadNetwork(
                f"gate {engine_stage.name!r} chooses among more than leaving and going on"
            )


def _joined(stages: Sequence[_Written], logits: Tensor, guarded: bool) -> Graph:
    """One graph of all stages, whose answers are like `logits` [n, C]."""
    from onnx import TensorProto, helper

    models = [stage.graph.model for stage in stages]
    _require_joinable(models)
    type_numbers = {
        torch.float32: TensorProto.FLOAT,
        torch.float64: TensorProto.DOUBLE,
        torch.float16: TensorProto.FLOAT16,
    }
    if logits.dtype not in type_numbers:
        raise BadNetwork(f"its answers are {str(logits.dtype).removeprefix('torch.')}")
    kinds = [type_numbers[logits.dtype], TensorProto.INT64]
    outputs = [*OUTPUTS]
    if guarded:
        kinds.append(TensorProto.FLOAT)
        outputs.append(GUARD)

    body = Body()
    ends = _rest(body, stages, {}, kinds)
    for end, output in zip(ends, outputs, strict=True):
        body.add("Identity", [end], output)
    graph = body.graph("offramp", outputs, kinds)

    # The inputs are the tensors that some stage reads and no stage writes.
    written = set[str]()
    for stage in stages:
        written.update(stage.graph.writes)
    inputs = dict[str, Any]()
    for model in models:
        for value in model.graph.input:
            if value.name not in written:
                inputs.setdefault(value.name, value)
    graph.input.extend(inputs.values())
    joined = helper.make_model(
        graph, opset_imports=models[0].opset_import, ir_version=models[0].ir_version
    )
    return Graph(stages[-1].name, tuple(inputs), tuple(outputs), joined)


def _require_joinable(models: Sequence[Any]) -> None:
    """Raise BadNetwork if models are too large together, or written for different ONNX versions."""
    size = sum([model.ByteSize() for model in models])
    if size > MOST_BYTES:
        raise BadNetwork(f"its graphs take {size / 1e9:.1f} GB, and one graph holds at most 2")
    versions = dict[str, int]()  # by domain of operators
    for model in models:
        for opset in model.opset_import:
            if versions.setdefault(opset.domain, opset.version) != opset.version:
                raise BadNetwork("its graphs are written in different versions of ONNX")


def _rest(
    body: Body, stages: Sequence[_Written], scope: Mapping[str, str], kinds: Sequence[int]
) -> tuple[str, ...]:
    """Write the rest of a chain of stages.

    A gate becomes an `If` with two branches. In the first, some rows go on: their tensors are
    gathered, the rest of the chain runs on them, and the results are scattered among those of all n
    rows here. In the second, no row goes on, and the answers of this stage are those of all rows.

    Args:
        body: takes the nodes and weights.
        stages: the stages from here on.
        scope: the names that tensors have in this branch; gathered tensors have new names.
        kinds: the types of logits and codes, and of the guard if the graph has one.

    Returns:
        The names of the logits [n, C] and codes [n] of the rows here, and of the guard [].
    """
    from onnx import TensorProto, helper

    stage = stages[0]
    later = stages[1:]
    name = stage.name
    graph = stage.graph.renamed(scope).graph
    body.nodes += graph.node
    body.weights += graph.initializer
    guarded = len(kinds) > len(OUTPUTS)
    if stage.last:
        if not guarded:
            return name + LOGITS, _zeros(body, name)
        return name + LOGITS, _zeros(body, name), _nothing(body, name)
    if stage.threshold is None:
        ends_here = _rest(body, later, scope, kinds)
        if not guarded:
            return ends_here
        return *ends_here[:2], _guard(body, stage, scope, ends_here[2])

    # Does any row stay? The largest code is 1 if so, and 0 if all rows leave.
    limit = body.constant(f"{name}::threshold", np.float32(stage.threshold))
    # [n] bool; false for NaN
    reached = body.add("GreaterOrEqual", [name + SCORE, limit], f"{name}::reached")
    stay = body.add("Not", [reached], f"{name}::stay")  # [n] bool
    if guarded:  # such a runtime may take NaN for a large number
        no_number = body.add("IsNaN", [name + SCORE], f"{name}::no number")
        stay = body.add("Or", [stay, no_number], f"{name}::stay or no number")
    code = body.add("Cast", [stay], f"{name}::code", to=TensorProto.INT64)  # [n]: 0 leaves, 1 stays
    most = body.add("ReduceMax", [code], f"{name}::most", keepdims=0)
    some = body.add("Cast", [most], f"{name}::some", to=TensorProto.BOOL)

    # First branch: gather the m rows that stay, and run the rest of the chain on them.
    goes = Body()
    axis = goes.constant(f"{name}::axis", np.array([0]))
    where = goes.add("NonZero", [stay], f"{name}::where")  # [1, m]
    index = goes.add("Squeeze", [where, axis], f"{name}::index")  # [m]
    inner = dict(scope)
    for key in stage.carries:
        inner[key] = goes.add("Gather", [scope.get(key, key), index], f"{name}::{key}", axis=0)
    logits, codes, *guards = _rest(goes, later, inner, kinds)  # [m, C], [m], and perhaps []
    # A row that goes on has passed one gate more, and is marked if its score was NaN.
    bad = goes.add("IsNaN", [name + SCORE], f"{name}::bad")
    one = goes.constant(f"{name}::1", np.int64(1))
    marked = goes.constant(f"{name}::nan", np.int64(1 + NAN_CODE))
    more = goes.add("Where", [bad, marked, one], f"{name}::more")  # [n]
    more = goes.add("Gather", [more, index], f"{name}::more here", axis=0)  # [m]
    codes = goes.add("Add", [codes, more], f"{name}::codes")
    # Write the results of the m rows over those of the n rows.
    last = goes.constant(f"{name}::last axis", np.array([1]))
    places = goes.add("Unsqueeze", [index, last], f"{name}::places")  # [m, 1]
    both_logits = goes.add("ScatterND", [name + LOGITS, places, logits], f"{name}::both logits")
    both_codes = goes.add("ScatterND", [code, places, codes], f"{name}::both codes")
    results = [both_logits, both_codes]
    for guard in guards:
        results.append(_guard(goes, stage, inner, guard))
    some_stay = goes.graph(f"{name} goes on", results, kinds)

    # Second branch: all rows leave here. An `If` may not return outer values, hence the copies.
    ends = Body()
    all_logits = ends.add("Identity", [name + LOGITS], f"{name}::all logits")
    all_codes = ends.add("Identity", [code], f"{name}::all codes")
    results = [all_logits, all_codes]
    if guarded:
        results.append(_nothing(ends, name))
    all_leave = ends.graph(f"{name} ends", results, kinds)

    outputs = (f"{name}::logits", f"{name}::passed", f"{name}::guarded")[: len(kinds)]
    node = helper.make_node(
        "If", [some], [*outputs], name=f"{name}::if", then_branch=some_stay, else_branch=all_leave
    )
    body.nodes.append(node)
    return outputs


def _guard(body: Body, stage: _Written, scope: Mapping[str, str], guard: str) -> str:
    """The guard of the stages after this one, plus the sums of the tensors that go on from here.

    A NaN or an infinity in one of them makes it NaN or infinite.
    """
    from onnx import TensorProto

    for number, (key, dtype) in enumerate(stage.floats):
        # [n, ...] -> []
        total = body.add("ReduceSum", [scope.get(key, key)], f"{stage.name}::{key} sum", keepdims=0)
        if dtype != torch.float32:
            total = body.add("Cast", [total], f"{total} in float32", to=TensorProto.FLOAT)
        guard = body.add("Add", [guard, total], f"{stage.name}::guard {number}")
    return guard


def _nothing(body: Body, name: str) -> str:
    """A guard of 0. An `If` may not return a weight, hence the copy."""
    zero = body.constant(f"{name}::no guard", np.float32(0))
    return body.add("Identity", [zero], f"{name}::guard")


def _zeros(body: Body, name: str) -> str:
    """Zeros [n], one for each row of the last stage."""
    shape = body.add("Shape", [name + LOGITS], f"{name}::shape", start=0, end=1)
    return body.add("ConstantOfShape", [shape], f"{name}::code", value=_int_zero())


def _int_zero() -> Any:
    from onnx import numpy_helper

    return numpy_helper.from_array(np.zeros(1, np.int64))


class OneGraph:
    """A schedule in one call. `graph(x)` returns Outputs, or None for rows that need the general
    loop of the Runner.

    Args:
        run: returns logits and codes for inputs by name; None for rows that only the stages answer
            right.
        lean: the same schedule as a loop over its stages.
        engine_stages: of the schedule.
    """

    def __init__(self, run: OneCall, lean: LeanChain, engine_stages: Sequence[EngineStage]) -> None:
        self._run = run
        self._lean = lean
        # By the number of gates passed: which exit answers there, and why.
        exits = list[int]()
        reasons = list[int]()
        for engine_stage in engine_stages:
            stage = engine_stage.stage
            if stage.gate or stage.last:
                exits.append(lean.exits.index(stage.name))
                reasons.append(GATE if stage.gate else WHY.index(stage.why))
        self._exit_indices = np.array(exits)
        self._why = np.array(reasons)

    def __call__(self, x: Any) -> Outputs | None:
        """The Outputs for x [B, ...]. Raises whatever the engine raises."""
        state = self._lean.bound(x)
        if state is None:
            return None
        count = len(next(iter(state.values())))
        if not count:
            return None
        answers = self._run(state)
        if answers is None:
            return self._lean(x)
        logits, codes = answers
        return Coded(logits, codes, self._exit_indices, self._why, self._lean.exits)


class Coded(FromArrays):
    """Outputs of one graph.

    Args:
        logits: [B, C].
        codes: [B].
        exit_indices: the exit that answers, by the number of gates passed.
        why: the reason, by the number of gates passed.
        exits: the names of the exits.
    """

    def __init__(
        self, logits: Array, codes: Array, exit_indices: Array, why: Array, exits: tuple[str, ...]
    ) -> None:
        super().__init__(logits, exits)
        self._coded = (codes, exit_indices, why)

    @cached_property
    def _tensors(self) -> Tensors:  # type: ignore[override]
        logits = self._array
        codes, exit_indices, why = self._coded
        passed = codes % NAN_CODE  # [B], number of gates
        reasons = why[passed]
        flags = codes >= NAN_CODE
        # A row that left at a gate had a score, so its logits were finite.
        ended = np.flatnonzero(reasons != GATE)
        flags[ended] |= ~np.isfinite(logits[ended].astype(np.float32, copy=False)).all(-1)
        return (
            self._logits,
            torch.from_numpy(exit_indices[passed]),
            torch.from_numpy(reasons),
            torch.from_numpy(flags),
        )


def farthest(
    graph: OneGraph, lean: LeanChain, engine_stages: Sequence[EngineStage], rows: State, band: float
) -> float:
    """Compare the logits of one graph with those of the stages, on rows with the same exit.

    Args:
        graph: the schedule in one call.
        lean: the same schedule as a loop over its stages.
        engine_stages: of the schedule.
        rows: named inputs [B, ...].
        band: logits may differ by it, or by a tenth of it times the largest logit. A row with a
            score within the band of a threshold may leave at another exit.

    Returns:
        The largest distance.

    Raises:
        BadNetwork: something differs by more.
    """
    x = given(rows)
    in_one = graph(x)
    in_stages = lean(x)
    if in_one is None or in_stages is None:
        return 0.0
    same_exit = (in_one.exit == in_stages.exit).numpy()  # [B]
    if not same_exit.all():
        others = {name: value[~same_exit] for name, value in rows.items()}
        count = _far_from_thresholds(engine_stages, others, band)
        if count:
            raise BadNetwork(f"{count} of {len(same_exit)} rows leave elsewhere in it")
    if not (in_one.flagged == in_stages.flagged).numpy()[same_exit].all():
        raise BadNetwork("it flags other rows")
    logits = in_one.logits.numpy()[same_exit]
    reference = in_stages.logits.numpy()[same_exit]
    finite = np.isfinite(reference)
    if (finite != np.isfinite(logits)).any():
        raise BadNetwork("its answers are finite where others are not")
    if not finite.any():
        return 0.0
    distance = float(np.abs(logits[finite] - reference[finite]).max())
    if not distance <= band * max(1.0, float(np.abs(reference[finite]).max()) / 10):
        raise BadNetwork(f"its logits differ by {distance:.2g} from those of the stages")
    return distance


def _far_from_thresholds(engine_stages: Sequence[EngineStage], rows: State, band: float) -> int:
    """How many rows have no score within the band of a threshold."""
    state = dict(rows)
    close = np.zeros(count_of(rows), bool)
    with torch.inference_mode():
        for engine_stage in engine_stages:
            engine_stage.call(state)
            if engine_stage.stage.gate:
                scores = state[engine_stage.name + SCORE].numpy()
                threshold = np.float32(engine_stage.stage.thresholds[0])
                close |= np.abs(scores - threshold) <= band
    return int((~close).sum())
