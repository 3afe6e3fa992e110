"""How far a run is from the floor: the engine's bare calls, and what a Runner adds to them.

    python benchmarks/floor.py --data DIR [--engine onnxruntime ...] [--case NAME ...] [--json FILE]

For each network, engine and batch size these calls are timed in turn, in one process:

    plain   the plain network, the engine's bare call (`session.run`, `infer`, the module itself)
    first   the first stage of the plan, bare
    parts   all stages of the plan, bare, on the rows that reach them, gathered beforehand
    lean    a loop by hand for this chain: bare stages, a comparison a gate, no check of anything
    graph   the whole plan as one graph, bare: what `export --one-file` writes (ONNX Runtime)
    run     `runner(x)` of `offramp.open`, where x is what the bare call takes: an array, or on
            torch a tensor
    tensor  the same for a tensor, where the bare call takes arrays. After a network that fills the
            cache, `Tensor.numpy` alone takes 50 microseconds.
    same    plain once more: how far two timings of one call lie apart

Every figure is a ratio to plain, of medians over interleaved blocks, in processor time and in
wall-clock. With more than one thread processor time adds up the threads. `over parts` is run minus
parts, in microseconds.

DIR holds cifar10/, mnist/ and weights/ (see benchmarks/fetch.py).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ladder import CALIBRATION, ladder, trace_of
from lenet import untrained

import offramp as off

# Internal: the baseline is given what the network is given.
from offramp.networks.inputs import as_inputs

# Internal: the names of what a stage gives.
from offramp.networks.network import LOGITS, SCORE

# Internal: the bare call of an engine is the baseline.
from offramp.runtime.benching import plain_call

# Internal: stages of a plan without the Runner around them.
from offramp.runtime.engine import engine_of

# Internal: the graphs that the engine runs.
from offramp.runtime.graphs import graphs_of

# Internal: the bootstrap of our own figures.
from offramp.runtime.measuring import ratio

ENGINES = ("onnxruntime", "openvino", "torch")
BATCHES = (1, 8, 64, 256)
FAR = 1e30  # a threshold that no score reaches: the gate is asked, and no row leaves
BLOCK = 2e-3  # seconds that one timing takes at least
CALLS = ("plain", "first", "parts", "lean", "graph", "run", "tensor", "same")
ROWS = slice(5000, 5256)

Call = Callable[[], object]
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A network, rows [256, ...] as the user hands them over, and a plan."""

    network: off.Network
    rows: np.ndarray
    plan: off.Plan


@dataclass(frozen=True)
class Step:
    """One stage of a chain for the loop by hand: arrays in, arrays out."""

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    run: Callable[[Arrays], Sequence[np.ndarray]]
    threshold: float | None


def lenet_case(data: Path, threshold: float) -> Case:
    """LeNet with BranchyNet's branch, not trained: the threshold alone decides who leaves."""
    rows = off.rows(f"mnist:{data / 'mnist'}").take(np.arange(ROWS.start, ROWS.stop)).x
    assert isinstance(rows, np.ndarray)
    return Case(untrained(0, rows[:4]), rows, off.Plan.by_hand({"conv1": threshold}))


def pictures(data: Path) -> np.ndarray:
    """256 test pictures of CIFAR-10."""
    rows = off.rows(f"cifar10:{data / 'cifar10'}").take(np.arange(ROWS.start, ROWS.stop)).x
    assert isinstance(rows, np.ndarray)
    return rows


def four_case(data: Path, *, asked: bool) -> Case:
    """ResNet-56 in four stages with three gates: all asked and none taken, or all closed."""
    rows = pictures(data)
    large = ladder(data, (20, 56), "own").members[-1]
    whole = ladder(data, (20, 56), "own")
    model = whole.model_of(large)
    preprocess = whole.preprocess_of(large)
    network = off.cut(
        model, rows[:4], parts=4, exits="linear", gate="margin", preprocess=preprocess
    )
    thresholds = dict.fromkeys(network.topology.gates, FAR) if asked else {}
    return Case(network, rows, off.Plan.by_hand(thresholds))


def ladder_case(data: Path, cache: Path) -> Case:
    """ResNet-20, then 56, at the certified threshold (accuracy gap at most half a point)."""
    trace = trace_of(data, cache, (20, 56), "own")
    plan = off.calibrate(trace[CALIBRATION], risk="accuracy_gap", at_most=0.005)
    thresholds = {gate: values[0] for gate, values in plan.thresholds.items()}
    return Case(ladder(data, (20, 56), "own"), pictures(data), off.Plan.by_hand(thresholds))


def cases(data: Path, cache: Path) -> dict[str, Callable[[], Case]]:
    """By name how each case is made."""
    return {
        "b-lenet, all leave": lambda: lenet_case(data, -FAR),
        "b-lenet, none leaves": lambda: lenet_case(data, FAR),
        "resnet56 in four, asked": lambda: four_case(data, asked=True),
        "resnet56 in four, closed": lambda: four_case(data, asked=False),
        "ladder 20 and 56, certified": lambda: ladder_case(data, cache),
    }


def bare_run(engine: str, graph: Any) -> Callable[[Arrays], Sequence[np.ndarray]]:
    """A graph as its engine runs it bare, with the options of `open`."""
    if engine == "onnxruntime":
        # Internal: the bare session of a graph.
        from offramp.engines.onnxruntime import _session

        return _session(graph)
    # Internal: the bare model of a graph.
    from offramp.engines.openvino import _model

    model = _model(graph)
    request = model.create_infer_request()
    ports = {name: port for port in model.outputs for name in port.get_names()}
    known = {name for port in model.inputs for name in port.get_names()}
    wanted = [ports[name] for name in graph.writes]

    def run(given: Arrays) -> Sequence[np.ndarray]:
        found = request.infer({name: given[name] for name in known}, share_inputs=True)
        return [found[port] for port in wanted]

    return run


def array_steps(case: Case, engine: str) -> list[Step]:
    """The stages of a chain as bare calls on arrays."""
    topology = case.network.topology
    schedule = case.plan.schedule(topology)
    state = dict(as_inputs(case.rows[:4]))
    shelved, _ = engine_of(engine)
    parts = shelved.open(case.network, schedule, case.network.device())
    found = []
    for part, graph in zip(parts, graphs_of(case.network, schedule, state), strict=True):
        limit = float(part.stage.thresholds[0]) if part.stage.gate else None
        found.append(Step(part.name, graph.reads, graph.writes, bare_run(engine, graph), limit))
        with torch.inference_mode():
            part.call(state)
    return found


def torch_steps(case: Case) -> list[Step]:
    """The stages of a chain as the torch engine's pieces, on tensors."""
    shelved, _ = engine_of("torch")
    schedule = case.plan.schedule(case.network.topology)
    found = []
    for part in shelved.open(case.network, schedule, case.network.device()):

        def run(state: Any, part: Any = part) -> Any:
            for piece in part.functions.values():
                state |= piece(state)
            return [state[name] for name in part.writes]

        reads = tuple(name for name in part.reads)
        limit = float(part.stage.thresholds[0]) if part.stage.gate else None
        found.append(Step(part.name, reads, part.writes, run, limit))
    return found


def lean_loop(steps: Sequence[Step], x: Any, kept: list[tuple[Step, Any]] | None = None) -> Any:
    """The chain by hand. kept: a list that gets each stage with what it was given."""
    answers: Any = None
    rows: Any = None
    state = {"x": x}
    for step in steps:
        given = {name: state[name] for name in step.reads}
        if kept is not None:
            kept.append((step, given))
        state.update(zip(step.writes, step.run(dict(given)), strict=True))
        if step.threshold is None:
            continue
        score = state[step.name + SCORE]
        if len(score) == 1:
            if float(score[0]) >= step.threshold:
                return state[step.name + LOGITS]
            continue
        leave = score >= step.threshold
        if not leave.any():
            continue
        logits = state[step.name + LOGITS]
        if answers is None:
            if isinstance(logits, np.ndarray):
                answers = logits.copy()
            else:
                answers = logits.clone()
        else:
            answers[rows] = logits
        if leave.all():
            return answers
        found = (~leave).nonzero()
        stay = found[0] if isinstance(leave, np.ndarray) else found.squeeze(1)
        state = {name: value[stay] for name, value in state.items()}
        rows = stay if rows is None else rows[stay]
    last = state[steps[-1].name + LOGITS]
    if answers is None:
        return last
    answers[rows] = last
    return answers


def calls_of(
    case: Case,
    engine: str,
    count: int,
    runner: Any,
    steps: Sequence[Step],
    graph: Any,
) -> dict[str, Call]:
    """What is timed at a batch size, by name."""
    rows = case.rows[:count]
    shelved, _ = engine_of(engine)
    tensor = as_inputs(rows)["x"]
    plain = plain_call(case.network, {"x": tensor}, shelved)
    x = tensor if engine == "torch" else rows
    kept: list[tuple[Step, Any]] = []
    with torch.inference_mode():
        lean_loop(steps, x, kept)

    def parts() -> None:
        with torch.inference_mode():
            for step, given in kept:
                step.run(dict(given))

    def first() -> None:
        step, given = kept[0]
        with torch.inference_mode():
            step.run(dict(given))

    def lean() -> Any:
        with torch.inference_mode():
            return lean_loop(steps, x)

    if engine != "torch":
        arrays = [(step.run, given) for step, given in kept]

        def parts() -> None:
            for run, given in arrays:
                run(given)

        def first() -> None:
            run, given = arrays[0]
            run(given)

        def lean() -> Any:
            return lean_loop(steps, x)

    found: dict[str, Call] = {"plain": plain, "first": first, "parts": parts, "lean": lean}
    if graph is not None:
        given = {"x": rows}
        found["graph"] = lambda: graph(given)
    found["run"] = lambda: runner(x)
    if engine != "torch":
        found["tensor"] = lambda: runner(tensor)
    found["same"] = plain
    return found


def timed(calls: dict[str, Call], repeats: int) -> dict[str, dict[str, np.ndarray]]:
    """Microseconds [repeats] of a call in both clocks; each timing is a block of calls."""
    times = {clock: {name: list[float]() for name in calls} for clock in ("cpu", "wall")}
    size = dict[str, int]()
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        size[name] = max(1, round(BLOCK / max(time.perf_counter() - start, 1e-6)))
    order = [*calls]
    for turn in range(repeats):
        for name in order if turn % 2 == 0 else reversed(order):
            call = calls[name]
            number = size[name]
            call()  # brings its weights and its code back into the cache
            wall = time.perf_counter()
            cpu = time.process_time()
            for _ in range(number):
                call()
            times["cpu"][name].append((time.process_time() - cpu) / number * 1e6)
            times["wall"][name].append((time.perf_counter() - wall) / number * 1e6)
    found = dict[str, dict[str, np.ndarray]]()
    for clock, some in times.items():
        found[clock] = {name: np.array(values) for name, values in some.items()}
    return found


def graph_of(case: Case) -> Any:
    """The plan as one graph in a session: a function of the arrays that it reads."""
    import onnx

    # Internal: a session with the options of `open`.
    from offramp.engines.onnxruntime import _session

    # Internal: the form in which it takes a graph.
    from offramp.runtime.onnx_graphs import Graph

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one"
        off.export(case.network, case.plan, path, example=case.rows[:4], one_file=True)
        model = onnx.load(str(path / "network.onnx"))
    return _session(Graph("one", ("x",), ("logits", "exit", "why", "flagged"), model))


def measured(
    name: str,
    case: Case,
    engine: str,
    batches: Sequence[int],
    repeats: int,
) -> list[dict[str, Any]]:
    """The lines of a network on an engine."""
    steps = torch_steps(case) if engine == "torch" else array_steps(case, engine)
    graph = graph_of(case) if engine == "onnxruntime" else None
    runner = off.open(case.network, case.plan, engine=engine, example=case.rows[:4])
    found = []
    for count in batches:
        exits = runner(case.rows[:count]).exit
        left = torch.bincount(exits, minlength=len(case.network.topology.exits)).tolist()
        times = timed(calls_of(case, engine, count, runner, steps, graph), repeats)
        found.append(line(name, engine, count, left, times))
        print(told(found[-1]), flush=True)
    return found


def line(
    name: str,
    engine: str,
    count: int,
    left: list[int],
    times: dict[str, Any],
) -> dict[str, Any]:
    """Ratios to plain and microseconds, in both clocks."""
    found: dict[str, Any] = {"case": name, "engine": engine, "batch": count, "left": left}
    for clock, some in times.items():
        ratios = {call: vars(ratio(values, some["plain"])) for call, values in some.items()}
        micros = {call: float(np.median(values)) for call, values in some.items()}
        over = float(np.median(some["run"] - some["parts"]))
        found[clock] = {"over_plain": ratios, "us": micros, "run_minus_parts_us": over}
    return found


def told(one: dict[str, Any]) -> str:
    """Two lines of the table: processor time, and wall-clock below it."""
    left = "/".join(map(str, one["left"]))
    texts = list[str]()
    for clock, whose in (("cpu", f"{one['batch']:>5} {left:<14}"), ("wall", " " * 20)):
        some = one[clock]
        cells = [f"{whose} {clock:<4} {some['us']['plain']:>10.1f}"]
        for call in CALLS[1:]:
            value = some["over_plain"].get(call)
            cells.append("      -" if value is None else f"{value['value']:7.3f}")
        spread = some["over_plain"]["run"]
        cells.append(f"  [{spread['low']:.3f}, {spread['high']:.3f}]")
        cells.append(f"{some['run_minus_parts_us']:9.1f}")
        texts.append(" ".join(cells))
    return "\n".join(texts)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("out"))
    parser.add_argument("--engine", action="append", metavar="ENGINE", choices=ENGINES)
    parser.add_argument("--case", action="append", metavar="NAME", help="how its name begins")
    parser.add_argument("--batch", action="append", type=int, metavar="N")
    parser.add_argument("--threads", type=int, action="append", help="1; twice: two tables")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    known = cases(args.data, args.cache)
    wanted = args.case or [""]
    results: list[dict[str, Any]] = []
    for threads in args.threads or [1]:
        torch.set_num_threads(threads)
        for name, make in known.items():
            if not any(name.startswith(one) for one in wanted):
                continue
            for engine in args.engine or ENGINES:
                case = make()
                print(f"\n{name}, {engine_of(engine)[1]}, threads: {threads}")
                heads = " ".join(f"{call:>7}" for call in CALLS[1:])
                print(f"batch {'left':<14} time   plain us {heads}  run             over parts")
                found = measured(name, case, engine, args.batch or BATCHES, args.repeats)
                results += [{"threads": threads, **one} for one in found]
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
