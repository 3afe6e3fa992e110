"""The graphs of a plan with forks as one ONNX model.

In a chain each gate opens a branch with the rest of the network. Forks meet again, so that does not
work here. Instead every tensor that a later stage reads has a buffer for all rows, and every stage
has flags of the rows that wait for it. A stage is an ONNX `If` on "does any row wait?":

    its rows = the rows that wait     -> gather what it reads from the buffers
    run its graph                     -> scatter what it gives into the buffers
    its gate picks an edge per row    -> raise the flag of the next stage, or write the answer

Stages are in topological order, so one pass answers all rows. A buffer begins with the default of
its tensor, which rows on other paths keep.

Shapes: N rows of the batch, n of them at this stage, C classes, K edges of a stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from offramp.deploy.one_file import OUTPUTS, WrittenStage, either, model_of, not_finite
from offramp.errors import BadNetwork
from offramp.networks.inputs import State
from offramp.networks.network import LOGITS, SCORE
from offramp.plans.replay import WHY
from offramp.plans.signature import is_input
from offramp.plans.topology import LEAVE
from offramp.runtime.one_graph import Body

# Names of values that are not tensors of the network begin with a colon.
WAITS = ":waits "  # before the name of a stage: 1 for rows that wait for it [N]


@dataclass
class _Buffers:
    """The current names of the values for all rows, which every stage replaces.

    Attributes:
        names: by tensor, flag or output.
        kinds: their ONNX types.
        count: how often a value was replaced, so that names are new.
    """

    names: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    count: int = 0

    def new_name(self, key: str) -> str:
        """A name that no value has yet."""
        self.count += 1
        return f":{self.count} {key}"


def one_model_of_forks(
    stages: Sequence[WrittenStage],
    inputs: Sequence[Any],
    thresholds: Mapping[str, Sequence[float]],
    classes: int,
    tensors: State,
    defaults: Mapping[str, float],
) -> Any:
    """Join the stages of a network with forks into one ONNX model.

    Args:
        stages: in topological order.
        inputs: the value infos of the network's inputs.
        thresholds: by gate, of its open ways. They become optional inputs `threshold/<gate>`: a
            number, or a list where there are several.
        classes: the number of classes C.
        tensors: all named tensors of the network on some rows, for shapes and types.
        defaults: the values of tensors where the segment that gives them did not run.

    Returns:
        An `onnx.ModelProto` with the outputs logits [B, C], exit [B], why [B] and flagged [B].

    Raises:
        BadNetwork: the graphs take more than 2 GB together, or a carried tensor is not numbers.
    """
    main = Body()
    limits = _limits(main, thresholds)
    writer = _Writer(stages, thresholds, tensors, defaults, inputs[0].name)
    return model_of(main, stages, inputs, limits, classes, writer.write)


def _limits(main: Body, thresholds: Mapping[str, Sequence[float]]) -> list[Any]:
    """The inputs of all thresholds; a weight with the name of an input is its default value."""
    from onnx import TensorProto, helper

    limits = []
    for gate, values in thresholds.items():
        name = f"threshold/{gate}"
        default = np.array(values, np.float32)
        if len(values) == 1:
            default = default[0]  # a number
        limits.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, default.shape))
        main.constant(name, default)
    return limits


@dataclass
class _Writer:
    """Writes the stages one after the other.

    Attributes:
        stages: in topological order.
        thresholds: by gate.
        tensors: on some rows.
        defaults: by tensor.
        first_input: the name of an input.
        buffers: the values for all rows.
    """

    stages: Sequence[WrittenStage]
    thresholds: Mapping[str, Sequence[float]]
    tensors: State
    defaults: Mapping[str, float]
    first_input: str
    buffers: _Buffers = field(default_factory=_Buffers)

    def write(self, body: Body, types: Sequence[int]) -> list[str]:
        """Write all stages, for a batch with rows. Returns the names of the four outputs."""
        from onnx import TensorProto

        self._start(body, self._row_count(body, self.first_input), types)
        # The first stage runs on all rows, so nothing is gathered.
        first = self.stages[0]
        scope = {name: self.buffers.names[name] for name in first.graph.reads}
        self._finish(body, first, self._run(body, first, scope), None)
        for written in self.stages[1:]:
            self._stage(body, written)
        names = [self.buffers.names[output] for output in OUTPUTS]
        flagged = body.add("Cast", [names[3]], ":flagged or not", to=TensorProto.BOOL)
        return [*names[:3], flagged]

    def _start(self, body: Body, count: str, types: Sequence[int]) -> None:
        """Write the buffers as they begin: defaults or zeros, no row waits, no answer."""
        from onnx import TensorProto

        carried = dict.fromkeys(self.stages[0].graph.reads)  # a set in order
        for written in self.stages:
            for names in written.carries:
                carried.update(dict.fromkeys(names))
        for name in carried:
            if is_input(name):
                self.buffers.names[name] = name
                continue
            tensor = self.tensors[name]
            kind = _kind_of(name, tensor)
            shape = tuple(tensor.shape[1:])
            self._full(body, name, count, shape, self.defaults.get(name, 0.0), kind)
        for written in self.stages[1:]:
            key = WAITS + written.stage.name
            self._full(body, key, count, (), 0, TensorProto.INT64)
        logits = self.tensors[self.stages[-1].stage.name + LOGITS]
        starts = (logits.shape[1:], (), (), ())
        kinds = (types[0], TensorProto.INT64, TensorProto.INT64, TensorProto.INT64)
        for output, shape, kind in zip(OUTPUTS, starts, kinds, strict=True):
            self._full(body, output, count, tuple(shape), 0, kind)

    def _full(
        self, body: Body, key: str, count: str, shape: tuple[int, ...], value: float, kind: int
    ) -> None:
        """Write a buffer [N, ...] with the same number everywhere."""
        from onnx import helper, numpy_helper

        name = self.buffers.new_name(key)
        whole = count  # [1], the shape [N]
        if shape:
            rest = body.constant(f"{name} row", np.array(shape, np.int64))
            whole = body.add("Concat", [count, rest], f"{name} shape", axis=0)
        number = np.full(1, value, helper.tensor_dtype_to_np_dtype(kind))
        body.add("ConstantOfShape", [whole], name, value=numpy_helper.from_array(number))
        self.buffers.names[key] = name
        self.buffers.kinds[key] = kind

    def _row_count(self, body: Body, value: str) -> str:
        """The number of rows as a shape [1]."""
        shape = body.add("Shape", [value], ":shape of all")
        start = body.constant(":0 of all", np.array([0]))
        end = body.constant(":1 of all", np.array([1]))
        return body.add("Slice", [shape, start, end], ":N")

    def _run(self, body: Body, written: WrittenStage, scope: Mapping[str, str]) -> dict[str, str]:
        """Write the graph of a stage. Returns the names of what it gives, by tensor."""
        outputs = {name: f":{written.stage.name} gives {name}" for name in written.graph.writes}
        graph = written.graph.renamed({**scope, **outputs}).graph
        body.nodes += graph.node
        body.weights += graph.initializer
        return outputs

    def _stage(self, body: Body, written: WrittenStage) -> None:
        """Write a stage that some rows wait for: an `If` around its graph."""
        name = written.stage.name
        waits = self.buffers.names.pop(WAITS + name)
        kind = self.buffers.kinds.pop(WAITS + name)
        del kind  # nobody reads the flags of this stage any more
        axis = body.constant(f":{name} axis", np.array([0]))
        where = body.add("NonZero", [waits], f":{name} where")  # [1, n]
        index = body.add("Squeeze", [where, axis], f":{name} index")  # [n]
        size = body.add("Size", [index], f":{name} size")
        zero = body.constant(f":{name} zero", np.int64(0))
        some = body.add("Greater", [size, zero], f":{name} some")

        before = dict(self.buffers.names)
        on = Body()
        scope = dict[str, str]()
        for read in written.graph.reads:
            scope[read] = on.add("Gather", [before[read], index], f":{name} reads {read}", axis=0)
        value = self._run(on, written, scope)
        self._finish(on, written, value, index)

        # What the stage has changed leaves the branch under new names.
        changed = [key for key in self.buffers.kinds if self.buffers.names[key] != before[key]]
        yes = [self.buffers.names[key] for key in changed]
        skipped = Body()
        no = []
        for key in changed:
            no.append(skipped.add("Identity", [before[key]], f":{name} keeps {key}"))
        outputs = []
        for key in changed:
            outputs.append(self.buffers.new_name(key))
            self.buffers.names[key] = outputs[-1]
        kinds = [self.buffers.kinds[key] for key in changed]
        either(body, some, (on, yes), (skipped, no), outputs, kinds)

    def _finish(
        self, body: Body, written: WrittenStage, value: Mapping[str, str], index: str | None
    ) -> None:
        """Write what follows the graph of a stage: carried tensors, answers and flags.

        Args:
            body: the branch that is written to.
            written: the stage.
            value: the names of what its graph gives, [n, ...] each.
            index: the name of the numbers [n] of its rows; None for all rows.
        """
        carried = dict[str, None]()
        for names in written.carries:
            carried.update(dict.fromkeys(names))
        for name in carried:
            if name in value:
                self._scatter(body, name, value[name], index)
        stage = written.stage
        takes = self._edges(body, written, value)
        for number, edge in enumerate(stage.edges):
            take = takes[number]  # [n] bool; None for all rows
            if edge.to == LEAVE:
                self._answer(body, written, value, index, take)
            else:
                self._wait(body, stage.name, edge.to, index, take, value)
        if stage.gate:
            self._flag_nan(body, stage.name, value[stage.name + SCORE], index)

    def _edges(
        self, body: Body, written: WrittenStage, value: Mapping[str, str]
    ) -> list[str | None]:
        """Which rows [n] take each edge, as `choose` decides: the first whose score reaches its
        threshold, otherwise the last. A NaN score reaches none.
        """
        stage = written.stage
        if not stage.gate:
            return [None]
        name = stage.name
        score = value[name + SCORE]
        limit = f"threshold/{name}"
        infinity = body.constant(f":{name} inf", np.float32(math.inf))
        takes = list[str | None]()
        rest: str | None = None  # rows that no edge so far has taken
        for number, route in enumerate(stage.routes):
            mark = f":{name} way {number}"
            one = score
            if self.tensors[name + SCORE].dim() > 1:
                column = body.constant(f"{mark} column", np.int64(route))
                one = body.add("Gather", [score, column], f"{mark} score", axis=1)  # [n]
            bound = limit
            if len(stage.routes) > 1:
                place = body.constant(f"{mark} place", np.int64(number))
                bound = body.add("Gather", [limit, place], f"{mark} limit", axis=0)
            reached = body.add("GreaterOrEqual", [one, bound], f"{mark} reached")
            is_open = body.add("Less", [bound, infinity], f"{mark} open")
            take = body.add("And", [reached, is_open], f"{mark} take")
            others = body.add("Not", [take], f"{mark} others")
            if rest is not None:
                take = body.add("And", [take, rest], f"{mark} take first")
                others = body.add("And", [others, rest], f"{mark} rest")
            takes.append(take)
            rest = others
        return [*takes, rest]

    def _answer(
        self,
        body: Body,
        written: WrittenStage,
        value: Mapping[str, str],
        index: str | None,
        take: str | None,
    ) -> None:
        """Write the answers of the rows that leave here."""
        stage = written.stage
        logits = value[stage.name + LOGITS]
        numbers = {"exit": written.exit_index, "why": WHY.index(stage.why)}
        self._put(body, stage.name, "logits", logits, index, take)
        for output, number in numbers.items():
            one = body.constant(f":{stage.name} its {output}", np.array([number], np.int64))
            self._put(body, stage.name, output, one, index, take)
        if stage.why != "gate":  # a row that left at a gate had a score, so it was finite
            bad = self._as_number(body, not_finite(body, f":{stage.name}", logits))
            self._put(body, stage.name, "flagged", bad, index, take, at_least=True)

    def _wait(
        self,
        body: Body,
        name: str,
        to: str,
        index: str | None,
        take: str | None,
        value: Mapping[str, str],
    ) -> None:
        """Raise the flags of the rows that go on to a stage."""
        one = body.constant(f":{name} goes to {to}", np.array([1], np.int64))
        self._put(body, f"{name} to {to}", WAITS + to, one, index, take)

    def _flag_nan(self, body: Body, name: str, score: str, index: str | None) -> None:
        """Flag the rows of which an open way has a score that is NaN."""
        from onnx import TensorProto

        bad = body.add("IsNaN", [score], f":{name} nan")
        number = body.add("Cast", [bad], f":{name} nan number", to=TensorProto.INT64)
        if self.tensors[name + SCORE].dim() > 1:
            stage = next(one.stage for one in self.stages if one.stage.name == name)
            columns = body.constant(f":{name} columns", np.array(stage.routes, np.int64))
            some = body.add("Gather", [number, columns], f":{name} nan of open ways", axis=1)
            last = body.constant(f":{name} last", np.array([1]))
            number = body.add("ReduceMax", [some, last], f":{name} nan row", keepdims=0)
        self._put(body, f"{name} nan", "flagged", number, index, None, at_least=True)

    def _put(
        self,
        body: Body,
        mark: str,
        key: str,
        value: str,
        index: str | None,
        take: str | None,
        *,
        at_least: bool = False,
    ) -> None:
        """Write a value into a buffer for some of the rows of a stage.

        Args:
            body: the branch that is written to.
            mark: a part of new names.
            key: the buffer.
            value: of the rows, [n, ...] or [1].
            index: numbers [n] of the rows; None for all.
            take: which of them [n]; None for all.
            at_least: whether a larger number that is there stays.
        """
        mark = f":{mark} puts {key}"
        before = self.buffers.names[key]  # [N, ...]
        here = before
        if index is not None:
            here = body.add("Gather", [before, index], f"{mark} here", axis=0)  # [n, ...]
        if at_least:
            value = body.add("Max", [here, value], f"{mark} larger")
        if take is None:
            # [1] -> [n], with the shape of what is there
            shape = body.add("Shape", [here], f"{mark} shape")
            value = body.add("Expand", [value, shape], f"{mark} value")
        else:
            condition = take  # [n]
            if key == "logits":
                axis = body.constant(f"{mark} axis", np.array([1]))
                condition = body.add("Unsqueeze", [take, axis], f"{mark} rows")  # [n, 1]
            value = body.add("Where", [condition, value, here], f"{mark} value")
        self._scatter(body, key, value, index, mark)

    def _scatter(
        self, body: Body, key: str, value: str, index: str | None, mark: str | None = None
    ) -> None:
        """Replace the rows of a stage in a buffer, or the buffer itself if these are all rows."""
        if index is None:
            self.buffers.names[key] = value
            return
        name = self.buffers.new_name(key)
        axis = body.constant(f"{name} axis", np.array([1]))
        places = body.add("Unsqueeze", [index, axis], f"{name} places")  # [n] -> [n, 1]
        self.buffers.names[key] = body.add(
            "ScatterND", [self.buffers.names[key], places, value], name
        )

    def _as_number(self, body: Body, flags: str) -> str:
        """Booleans as 0 and 1."""
        from onnx import TensorProto

        return body.add("Cast", [flags], f"{flags} as number", to=TensorProto.INT64)


def _kind_of(name: str, tensor: Any) -> int:
    """The ONNX type of a tensor. Raises BadNetwork for one that cannot be scattered."""
    from onnx import helper

    array = tensor[:1].detach().cpu().numpy()
    if array.dtype == bool:
        raise BadNetwork(
            f"one file can carry numbers between stages, and {name!r} is booleans. Export without "
            f"one_file"
        )
    return int(helper.np_dtype_to_tensor_dtype(array.dtype))
