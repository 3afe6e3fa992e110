"""Engines side by side: what skipping costs beside the bare segments, and what taking a model apart
costs.

    python benchmarks/engines.py --data DIR [--engine torch ...] [--plain torch:bf16 ...]
        [--json FILE]

On each engine: a batch of 64 with mixed exits against the sum of its bare segments (a ladder of
ResNet-20 and -56); the plain ResNet-56 split in four with no exit taken against the whole of it, at
batch 1 and 64; and the plain ResNet-56 at batch 1 and 64 against the first engine, also on those of
--plain. An engine that compiles joins segments between which nothing is asked. Every line is
measured in one run, its calls interleaved, with the same call twice to show the noise. Measure
where nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from ladder import ladder

import offramp as off

# Internal: the baseline is given what the network is given.
from offramp.networks.inputs import State, as_inputs

# Internal: the same clock as `offramp bench`.
from offramp.runtime.benching import bench, plain_call

# Internal: the bare call of an engine is the baseline.
from offramp.runtime.engine import Engine, engine_of

# Internal: times taken in turn, as in our own figures.
from offramp.runtime.measuring import Ratio, interleaved, ratio

Clock = Callable[[], float]
ENGINES = ("torch", "onnxruntime", "openvino")


def mixed(
    network: off.Network, rows: np.ndarray, engine: str, repeats: int, clock: Clock
) -> list[dict[str, object]]:
    """A batch of 64 of which 0, 16, 32, 48 and 64 rows leave at the first exit; identical rows
    never tie for us.
    """
    with torch.inference_mode():
        scores = next(network.walk(rows[:64]))[2]
    assert scores is not None
    order = scores.sort(descending=True).values
    found = []
    for leave in (0, 16, 32, 48, 64):
        edge = (
            np.inf
            if leave == 0
            else order[-1] - 1
            if leave == 64
            else order[leave - 1 : leave + 1].mean()
        )
        plan = off.Plan.by_hand({network.topology.gates[0]: float(edge)})
        result = bench(
            network, plan, rows[:64], batches=(64,), repeats=repeats, engine=engine, clock=clock
        )
        print(result if not found else str(result).splitlines()[1], flush=True)
        found += result.to_json()["lines"]
    return found


def split(
    model: torch.nn.Module,
    preprocess: torch.nn.Module,
    rows: np.ndarray,
    engine: str,
    repeats: int,
    clock: Clock,
) -> list[object]:
    """The model in four segments, exits closed, against the whole: the sum of its segments, and a
    Runner that walks.
    """
    network = off.cut(model, rows[:4], engine_stages=4, preprocess=preprocess)
    shelved, _ = engine_of(engine)
    schedule = off.Plan.never_leave(network.topology).schedule(network.topology)
    engine_stages = shelved.open(network, schedule, network.device())
    runner = off.open(network, off.Plan.by_hand({}), engine=engine)
    found: list[object] = []
    for batch in (1, 64):
        x = as_inputs(rows[:batch])
        whole = plain_call(network, x, shelved)
        calls = {
            "whole": whole,
            "pieces": _walking(engine_stages, x),
            "run": lambda x=x: runner(x["x"]),
            "same": whole,
        }
        times = interleaved(calls, repeats=repeats, warmup=2, clock=clock)
        lines = {name: ratio(times[name], times["whole"]) for name in ("pieces", "run", "same")}
        _print(
            f"split in {len(engine_stages)}, batch {batch}", float(np.median(times["whole"])), lines
        )
        found.append(
            {"batch": batch, "whole_ms": float(np.median(times["whole"])), **_plain(lines)}
        )
    return found


def _walking(engine_stages: tuple[object, ...], x: State) -> Callable[[], object]:
    def call() -> None:
        state = dict(x)
        with torch.inference_mode():
            for engine_stage in engine_stages:
                engine_stage.call(state)  # type: ignore[attr-defined]

    return call


def plain(
    network: off.Network, rows: np.ndarray, engines: list[str], repeats: int, clock: Clock
) -> dict[str, object]:
    """The plain network on every engine, interleaved, over the first of them."""
    x = as_inputs(rows)
    modules: dict[str, Engine] = {name: engine_of(name)[0] for name in engines}
    calls = {name: plain_call(network, x, module) for name, module in modules.items()}
    times = interleaved(calls | {"same": calls[engines[0]]}, repeats=repeats, warmup=3, clock=clock)
    lines = {name: ratio(times[name], times[engines[0]]) for name in times}
    _print(f"batch {len(rows)}, over {engines[0]}", float(np.median(times[engines[0]])), lines)
    return {"first_ms": float(np.median(times[engines[0]])), **_plain(lines)}


def _print(what: str, ms: float, lines: dict[str, Ratio]) -> None:
    print(
        f"{what:<22} {ms:8.2f} ms  "
        + "  ".join(f"{name} {value}" for name, value in lines.items()),
        flush=True,
    )


def _plain(lines: dict[str, Ratio]) -> dict[str, object]:
    return {name: vars(value) for name, value in lines.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--engine",
        action="append",
        metavar="ENGINE",
        help="torch, onnxruntime, openvino, torch:bf16, ...",
    )
    parser.add_argument("--only-plain", action="store_true", help="the last table alone")
    parser.add_argument(
        "--plain", action="append", default=[], metavar="ENGINE", help="for the last table alone"
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="processor time instead of wall-clock, for one thread",
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.threads:
        torch.set_num_threads(args.threads)
    engines = args.engine or [*ENGINES]
    network = ladder(args.data, (20, 56), "own")
    rows = off.rows(f"cifar10:{args.data / 'cifar10'}").take(np.arange(5000, 5064)).x
    assert isinstance(rows, np.ndarray)
    large = network.members[-1]
    model = network.model_of(large)
    preprocess = network.preprocess_of(large)
    assert preprocess is not None
    results: dict[str, object] = {"threads": torch.get_num_threads()}
    for engine in [] if args.only_plain else engines:
        print(f"\n{engine_of(engine)[1]}, {torch.get_num_threads()} threads")
        results[engine] = {
            "mixed": mixed(network, rows, engine, args.repeats, clock),
            "split": split(model, preprocess, rows, engine, args.repeats, clock),
        }
    print()
    every = [*engines, *args.plain]
    results["plain"] = {
        size: plain(network, rows[:size], every, args.repeats * (3 if size == 1 else 1), clock)
        for size in (1, 64)
    }
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
