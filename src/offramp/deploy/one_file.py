"""All graphs of a plan as one ONNX model, with the compaction inside and the thresholds as inputs.

After each gate follows an ONNX `If` on "does any row stay?". Its "yes" branch gathers the rows that
stay, runs the rest of the network on them, and scatters their answers back into the batch. Its "no"
branch returns the answers of this exit, so that a batch without such rows skips the rest.

Shapes: N rows at this stage, n of them stay, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.errors import BadNetwork
from offramp.networks.network import LOGITS, SCORE
from offramp.plans.replay import WHY
from offramp.plans.schedule import Stage
from offramp.runtime.one_graph import MOST_BYTES, Body
from offramp.runtime.onnx_graphs import Graph

OUTPUTS = ("logits", "exit", "why", "flagged")


@dataclass(frozen=True)
class WrittenStage:
    """A stage of a schedule as a graph.

    Attributes:
        stage: the stage.
        graph: its ONNX graph.
        exit_index: index of its exit among the network's exits; -1 without an exit.
        carries: for each of its edges, the names of the tensors that later stages read.
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
    """Join the stages of a chain into one ONNX model.

    Args:
        stages: the stages, first to last.
        inputs: the value infos of the network's inputs.
        thresholds: by gate. They become optional inputs `threshold/<gate>` with these defaults.
        classes: the number of classes C.

    Returns:
        An `onnx.ModelProto` with the outputs logits [B, C], exit [B], why [B] and flagged [B].

    Raises:
        BadNetwork: The graphs take more than 2 GB together, the limit of one ONNX file.
    """
    from onnx import TensorProto, helper

    main = Body()
    # A weight with the name of an input is that input's default value.
    limits = []
    for gate, threshold in thresholds.items():
        name = f"threshold/{gate}"
        limits.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))
        main.constant(name, np.float32(threshold))

    def write(body: Body, types: Sequence[int]) -> Sequence[str]:
        return _rest(body, stages, {}, types)

    return model_of(main, stages, inputs, limits, classes, write)


def model_of(
    main: Body,
    stages: Sequence[WrittenStage],
    inputs: Sequence[Any],
    limits: Sequence[Any],
    classes: int,
    write: Callable[[Body, Sequence[int]], Sequence[str]],
) -> Any:
    """A model with everything around the stages: inputs, outputs, and batches without rows.

    Args:
        main: the graph, with the default values of the thresholds.
        stages: that are joined.
        inputs: the value infos of the network's inputs.
        limits: those of the thresholds.
        classes: the number of classes C.
        write: writes the network for a batch with rows into a branch, given the types of the
            outputs. It returns the names of the outputs there.

    Raises:
        BadNetwork: the graphs take more than 2 GB together.
    """
    from onnx import TensorProto, helper

    first = stages[0].graph.model
    size = sum(stage.graph.model.ByteSize() for stage in stages)
    if size > MOST_BYTES:
        raise BadNetwork(
            f"the graphs must take at most 2 GB for one file, got {size / 1e9:.1f} GB. Export "
            f"without one_file"
        )
    logits_type = _type_of_logits(stages[-1].graph.model)
    types = (logits_type, TensorProto.INT64, TensorProto.INT64, TensorProto.BOOL)

    # With rows: the whole network. Without rows: empty outputs, because not every graph takes 0
    # rows.
    network = Body()
    answers = write(network, types)
    empty = Body()
    empty_answers = _empty_outputs(empty, classes, types)
    size_name = main.add("Size", [inputs[0].name], ":size")
    any_row = main.add("Greater", [size_name, main.constant(":0", np.int64(0))], ":some")
    either(main, any_row, (network, answers), (empty, empty_answers), OUTPUTS, types)

    graph = main.graph("offramp", OUTPUTS, types)
    graph.input.extend([*inputs, *limits])
    return helper.make_model(graph, opset_imports=first.opset_import, ir_version=first.ir_version)


def _type_of_logits(model: Any) -> int:
    """The ONNX type of a graph's logits."""
    for value in model.graph.output:
        if str(value.name).endswith(LOGITS):
            return int(value.type.tensor_type.elem_type)
    raise AssertionError("the last stage has no logits")


def _empty_outputs(body: Body, classes: int, types: Sequence[int]) -> list[str]:
    """Write the outputs for 0 rows. Returns their names."""
    from onnx import helper

    shapes = ((0, classes), (0,), (0,), (0,))
    names = []
    for output, shape, kind in zip(OUTPUTS, shapes, types, strict=True):
        value = np.zeros(shape, helper.tensor_dtype_to_np_dtype(kind))
        name = body.constant(f":no {output}", value)
        names.append(body.add("Identity", [name], f"{name} row"))
    return names


def _rest(
    body: Body, stages: Sequence[WrittenStage], scope: dict[str, str], types: Sequence[int]
) -> tuple[str, ...]:
    """Write the stages of a chain into `body`.

    The function calls itself for the stages behind a gate, because these go into a branch of its
    `If`.

    Args:
        body: the graph, or the branch, that is written to.
        stages: the stages from here on.
        scope: names of tensors after rows were gathered, by their original names.
        types: ONNX types of the four outputs.

    Returns:
        The names of logits [N, C], exit [N], why [N] and flagged [N] for the rows here.
    """
    written = stages[0]
    later = stages[1:]
    stage = written.stage
    name = stage.name

    # The graph of this stage. Without a gate all rows go on to the next.
    graph = written.graph.renamed(scope).graph
    body.nodes += graph.node
    body.weights += graph.initializer
    if not (stage.gate or stage.last):
        return _rest(body, later, scope, types)

    # The answers of this exit, for all rows here.
    logits = name + LOGITS
    count = _row_count(body, name, logits)
    exit_ = _repeated(body, name, "exit", written.exit_index, count)
    why = _repeated(body, name, "why", WHY.index(stage.why), count)
    if stage.last:
        return logits, exit_, why, not_finite(body, name, logits)
    flagged = body.add("IsNaN", [name + SCORE], f"{name}::flagged")
    answers = (logits, exit_, why, flagged)

    # The indices [n] of the rows that stay, and whether there are any.
    stay = _stay(body, name)
    body.constant(f"{name}::axis", np.array([0]))
    where = body.add("NonZero", [stay], f"{name}::where")  # [1, n]
    index = body.add("Squeeze", [where, f"{name}::axis"], f"{name}::index")  # [n]
    stay_count = body.add("Size", [index], f"{name}::stay count")
    zero = body.constant(f"{name}::0", np.int64(0))
    any_stays = body.add("Greater", [stay_count, zero], f"{name}::some")

    # The branch for rows that stay: gather them, run the later stages, scatter the answers back.
    on = Body()
    inner_scope = dict(scope)
    for key in written.carries[-1]:
        tensor = scope.get(key, key)
        inner_scope[key] = on.add("Gather", [tensor, index], f"{name}::{key}", axis=0)
    later_answers = _rest(on, later, inner_scope, types)
    joined = _scattered(on, name, answers, later_answers, index)

    # The branch where all rows leave. A branch cannot return outer tensors, hence the Identity.
    done = Body()
    own = tuple(done.add("Identity", [answer], f"{answer} of all") for answer in answers)
    outputs = tuple(f"{name}::all {output}" for output in OUTPUTS)
    either(body, any_stays, (on, joined), (done, own), outputs, types)
    return outputs


def _row_count(body: Body, name: str, logits: str) -> str:
    """The number of rows as a shape: the first entry [1] of the shape of the logits."""
    shape = body.add("Shape", [logits], f"{name}::shape")
    start = body.constant(f"{name}::from", np.array([0]))
    end = body.constant(f"{name}::to", np.array([1]))
    return body.add("Slice", [shape, start, end], f"{name}::n")


def _repeated(body: Body, name: str, output: str, value: int, count: str) -> str:
    """The same number for every row: [1] -> [N]."""
    constant = body.constant(f"{name}::its {output}", np.array([value], np.int64))
    return body.add("Expand", [constant, count], f"{name}::{output}")


def not_finite(body: Body, name: str, logits: str) -> str:
    """Whether a row [N] has a logit that is NaN or infinite.

    x - x is 0 for finite x and NaN otherwise, so the sum over a row [N, C] -> [N] is NaN exactly
    where a logit is not finite.
    """
    difference = body.add("Sub", [logits, logits], f"{name}::0")
    last_axis = body.constant(f"{name}::-1", np.array([-1]))
    total = body.add("ReduceSum", [difference, last_axis], f"{name}::sum", keepdims=0)
    return body.add("IsNaN", [total], f"{name}::flagged")


def _stay(body: Body, name: str) -> str:
    """Whether each row [N] stays, as `choose` decides: a NaN score stays, and at a threshold of
    +inf all rows stay.
    """
    limit = f"threshold/{name}"
    reached = body.add("GreaterOrEqual", [name + SCORE, limit], f"{name}::reached")
    infinity = body.constant(f"{name}::inf", np.float32(math.inf))
    open_ = body.add("Less", [limit, infinity], f"{name}::open")
    leave = body.add("And", [reached, open_], f"{name}::leave")
    return body.add("Not", [leave], f"{name}::stay")


def _scattered(
    body: Body, name: str, answers: Sequence[str], later: Sequence[str], index: str
) -> tuple[str, ...]:
    """Put the answers of the rows that went on into the answers of all rows.

    Args:
        body: the branch that is written to.
        name: of the stage.
        answers: names of logits [N, C], exit [N], why [N] and flagged [N] at this stage.
        later: names of the same for the rows that went on, [n, C] and [n].
        index: name of the indices [n] of these rows.

    Returns:
        The names of the joined outputs. A row that was flagged here stays flagged.
    """
    from onnx import TensorProto

    axis = body.constant(f"{name}::1", np.array([1]))
    indices = body.add("Unsqueeze", [index, axis], f"{name}::places")  # [n] -> [n, 1]
    outputs = []
    for answer, later_answer in zip(answers[:3], later[:3], strict=True):
        outputs.append(body.add("ScatterND", [answer, indices, later_answer], f"{answer} of both"))

    # Flags are scattered as integers, because not every version scatters booleans.
    was_flagged = body.add("Gather", [answers[3], index], f"{name}::was flagged", axis=0)
    now_flagged = body.add("Or", [was_flagged, later[3]], f"{name}::now flagged")
    numbers = _as_numbers(body, answers[3])
    now_numbers = _as_numbers(body, now_flagged)
    joined = body.add("ScatterND", [numbers, indices, now_numbers], f"{numbers} of both")
    flagged = body.add("Cast", [joined], f"{name}::flagged of both", to=TensorProto.BOOL)
    return (*outputs, flagged)


def _as_numbers(body: Body, flags: str) -> str:
    """Booleans as 0 and 1."""
    from onnx import TensorProto

    return body.add("Cast", [flags], f"{flags} as number", to=TensorProto.INT64)


def either(
    body: Body,
    condition: str,
    yes: tuple[Body, Sequence[str]],
    no: tuple[Body, Sequence[str]],
    outputs: Sequence[str],
    types: Sequence[int],
) -> None:
    """Write an `If` with two branches, each a body and the names of its outputs."""
    from onnx import helper

    yes_body, yes_outputs = yes
    no_body, no_outputs = no
    node = helper.make_node(
        "If",
        [condition],
        [*outputs],
        name=condition,
        then_branch=yes_body.graph(f"{condition} yes", yes_outputs, types),
        else_branch=no_body.graph(f"{condition} no", no_outputs, types),
    )
    body.nodes.append(node)
