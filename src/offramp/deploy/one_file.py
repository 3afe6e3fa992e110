"""All graphs of a plan as one ONNX model, with the compaction inside and the thresholds as inputs.

After each gate stands an `If`: where rows go on they are gathered, the rest of the network runs on
them, and its answers are scattered back to their places; where none goes on nothing else runs. So
whole batches and single rows skip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.errors import BadNetwork
from offramp.networks.network import LOGITS, SCORE
from offramp.plans.schedule import Stage
from offramp.plans.trace import WHY
from offramp.runtime.one_graph import MOST_BYTES, Body
from offramp.runtime.onnx_graphs import Graph

OUTPUTS = ("logits", "exit", "why", "flagged")


@dataclass(frozen=True)
class WrittenStage:
    """A stage of a schedule as a graph: the number of its exit (-1 without), and what each of its
    edges carries.
    """

    stage: Stage
    graph: Graph
    exit_index: int
    carries: tuple[tuple[str, ...], ...]


def one_model(
    stages: Sequence[WrittenStage],
    inputs: Sequence[Any],
    thresholds: dict[str, float],
    classes: int,
) -> Any:
    """One `onnx.ModelProto`: the inputs of the network and `threshold/<gate>` -> logits, exit, why,
    flagged.

    inputs: their value infos. A threshold that is not given is that of the plan. Raises BadNetwork
    above 2 GB.
    """
    from onnx import TensorProto, helper

    first = stages[0].graph.model
    size = sum(stage.graph.model.ByteSize() for stage in stages)
    if size > MOST_BYTES:
        raise BadNetwork(
            f"the graphs take {size / 1e9:.1f} GB, expected at most 2 for one file; export "
            f"without it"
        )
    logits = next(
        value.type.tensor_type.elem_type
        for value in stages[-1].graph.model.graph.output
        if _is_logits(value)
    )
    kinds = (logits, TensorProto.INT64, TensorProto.INT64, TensorProto.BOOL)
    body = Body()
    rest = Body()
    none = Body()
    limits = [
        helper.make_tensor_value_info(f"threshold/{gate}", TensorProto.FLOAT, [])
        for gate in thresholds
    ]
    for gate, value in thresholds.items():
        body.constant(f"threshold/{gate}", np.float32(value))
    found = _rest(rest, stages, {}, kinds)
    shapes = ((0, classes), (0,), (0,), (0,))
    empty = []
    for end, shape, kind in zip(OUTPUTS, shapes, kinds, strict=True):
        empty.append(
            none.constant(f":no {end}", np.zeros(shape, helper.tensor_dtype_to_np_dtype(kind)))
        )
    ends = [none.add("Identity", [name], f"{name} row") for name in empty]
    some = body.add(
        "Greater",
        [body.add("Size", [inputs[0].name], ":size"), body.constant(":0", np.int64(0))],
        ":some",
    )
    _either(body, some, (rest, found), (none, ends), OUTPUTS, kinds)
    whole = body.graph("offramp", OUTPUTS, kinds)
    whole.input.extend([*inputs, *limits])
    return helper.make_model(whole, opset_imports=first.opset_import, ir_version=first.ir_version)


def _is_logits(value: Any) -> bool:
    return str(value.name).endswith(LOGITS)


def _rest(
    body: Body, stages: Sequence[WrittenStage], scope: dict[str, str], kinds: Sequence[int]
) -> tuple[str, ...]:
    """Write the stages of a chain from `stages[0]` on into `body`.

    Returns the names of logits, exit, why and flagged of the rows there.
    scope: names that tensors have here, where rows were gathered.
    """
    written = stages[0]
    later = stages[1:]
    stage = written.stage
    name = stage.name
    graph = written.graph.renamed(scope).graph
    body.nodes += graph.node
    body.weights += graph.initializer
    if not (stage.gate or stage.last):
        return _rest(body, later, scope, kinds)
    logits = name + LOGITS
    count = body.add(
        "Slice", [body.add("Shape", [logits], f"{name}::shape"), *_ends(body, name)], f"{name}::n"
    )
    exit_, why = (
        body.add(
            "Expand",
            [body.constant(f"{name}::its {what}", np.array([value], np.int64)), count],
            f"{name}::{what}",
        )
        for what, value in (("exit", written.exit_index), ("why", WHY.index(stage.why)))
    )
    if stage.last:
        # NaN where a logit is NaN or infinite
        none = body.add("Sub", [logits, logits], f"{name}::0")
        total = body.add(
            "ReduceSum",
            [none, body.constant(f"{name}::-1", np.array([-1]))],
            f"{name}::sum",
            keepdims=0,
        )
        return logits, exit_, why, body.add("IsNaN", [total], f"{name}::flagged")
    own = (logits, exit_, why, body.add("IsNaN", [name + SCORE], f"{name}::flagged"))
    stay = _stay(body, name)
    index = body.add(
        "Squeeze",
        [body.add("NonZero", [stay], f"{name}::where"), f"{name}::axis"],
        f"{name}::index",
    )
    body.constant(f"{name}::axis", np.array([0]))
    size = body.add("Size", [index], f"{name}::stay count")
    some = body.add("Greater", [size, body.constant(f"{name}::0", np.int64(0))], f"{name}::some")
    on = Body()
    done = Body()
    inner = {}
    for key in written.carries[-1]:
        inner[key] = on.add("Gather", [scope.get(key, key), index], f"{name}::{key}", axis=0)
    found = _scattered(on, name, own, _rest(on, later, scope | inner, kinds), index)
    ends = tuple(done.add("Identity", [end], f"{end} of all") for end in own)
    outputs = tuple(f"{name}::all {what}" for what in OUTPUTS)
    _either(body, some, (on, found), (done, ends), outputs, kinds)
    return outputs


def _ends(body: Body, name: str) -> list[str]:
    """From the first number of a shape to the second."""
    return [
        body.constant(f"{name}::from", np.array([0])),
        body.constant(f"{name}::to", np.array([1])),
    ]


def _stay(body: Body, name: str) -> str:
    """The rows [n] that do not leave, as `choose` says: NaN stays, and at +inf all do."""
    limit = f"threshold/{name}"
    reached = body.add("GreaterOrEqual", [name + SCORE, limit], f"{name}::reached")
    open_ = body.add(
        "Less", [limit, body.constant(f"{name}::inf", np.float32(math.inf))], f"{name}::open"
    )
    return body.add("Not", [body.add("And", [reached, open_], f"{name}::leave")], f"{name}::stay")


def _scattered(
    body: Body, name: str, own: Sequence[str], found: Sequence[str], index: str
) -> tuple[str, ...]:
    """Answers of all rows, with those of the rows that went on in their places; a flag once set
    stays.
    """
    from onnx import TensorProto

    places = body.add(
        "Unsqueeze", [index, body.constant(f"{name}::1", np.array([1]))], f"{name}::places"
    )
    was = body.add("Gather", [own[3], index], f"{name}::was flagged", axis=0)
    flags = body.add("Or", [was, found[3]], f"{name}::now flagged")
    numbers = [
        body.add("Cast", [each], f"{each} as number", to=TensorProto.INT64)
        for each in (own[3], flags)
    ]  # not every version scatters booleans
    pairs = [*zip(own[:3], found[:3], strict=True), (numbers[0], numbers[1])]
    ends = [body.add("ScatterND", [one, places, other], f"{one} of both") for one, other in pairs]
    return (*ends[:3], body.add("Cast", [ends[3]], f"{name}::flagged of both", to=TensorProto.BOOL))


def _either(
    body: Body,
    some: str,
    yes: tuple[Body, Sequence[str]],
    no: tuple[Body, Sequence[str]],
    outputs: Sequence[str],
    kinds: Sequence[int],
) -> None:
    from onnx import helper

    then, other = (
        one.graph(f"{some} {word}", ends, kinds) for (one, ends), word in ((yes, "yes"), (no, "no"))
    )
    body.nodes.append(
        helper.make_node("If", [some], [*outputs], name=some, then_branch=then, else_branch=other)
    )
