"""Eight bits on ONNX Runtime beside float32: time, accuracy, and a promise of its own.

    python benchmarks/int8.py --data DIR [--case ladder] [--rows 2000] [--json FILE]

Two networks: a ladder of ResNet-20 and ResNet-56, and ResNet-56 in four with three exits, which are
trained on 10,000 training pictures when they are not in the cache. Three engines:

    float32      onnxruntime
    int8         onnxruntime:int8=DATA, scales of 200 training pictures
    int8, reach  onnxruntime:int8=DATA,reach=plan.json: the scales of a segment follow those of the
                 200 that reach it under a plan, in which a gate lets 0.3 of all pictures go on

Each engine records rows 1,000 and up of the test set and gets a promise from them: disagreement
with the last exit on the same engine. Rows 5,000 and up give the figures. Times are the bare call
of the plain network, float32 and int8 in turn, in processor time on one thread; float32 once more
shows how far two timings of one call lie apart.

DIR holds cifar10/ with both sets, and weights/ (see benchmarks/fetch.py).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ladder import ladder

import offramp as off

# Internal: the baseline is given what the network is given.
from offramp.networks.inputs import as_inputs

# Internal: the bare call of an engine is the baseline.
from offramp.runtime.benching import plain_call

# Internal: an engine without the Runner around it.
from offramp.runtime.engine import engine_of

# Internal: interleaved timings, and the bootstrap of our own figures.
from offramp.runtime.measuring import interleaved, ratio

TRAINED = slice(0, 10000)  # of the training set: for the exits
SCALES = slice(20000, 20200)  # for the scales
CHOSEN = slice(20200, 20700)  # for the thresholds of the plan for scales
GOES_ON = 0.3  # share of all rows that a gate lets go on under that plan
CALIBRATION = 1000  # the first row of the test set for a promise
FIGURES = 5000  # the first row of the test set for figures
BATCHES = (1, 64)
CASES = ("ladder", "four")


def train(data: Path, rows: slice) -> str:
    """Some rows of the training set, as a spec."""
    return f"cifar10/train:{data / 'cifar10'}[{rows.start}:{rows.stop}]"


def four(data: Path, cache: Path) -> off.Network:
    """ResNet-56 in four, with exits trained on a frozen backbone; from the cache or now."""
    path = cache / "four-56"
    if path.exists():
        return off.load(path)
    spec = "offramp:resnet56"
    model = off.make_model(spec, data / "weights" / "cifar10_resnet56.safetensors")
    preprocess = off.make_preprocess(spec)
    source = off.rows(train(data, TRAINED))
    example = source.take(np.arange(8)).x
    network = off.cut(model, example, parts=4, preprocess=preprocess, spec=spec)
    development = off.rows(f"cifar10:{data / 'cifar10'}").select(slice(0, 1000))
    off.fit(network, source, recipe="hinge", development=development, cache=cache)
    off.save(network, path)
    return network


def accuracies(trace: off.Trace) -> dict[str, float]:
    """The share of right answers of each exit."""
    label = trace.columns["label"]
    shares = dict[str, float]()
    for name in trace.topology.exits:
        right = trace.columns[f"logits/{name}"].argmax(1) == label
        shares[name] = float(right.mean())
    return shares


def plan_for_scales(network: off.Network, data: Path) -> off.Plan:
    """A plan set by hand at a quantile of the float32 scores of some training rows."""
    trace = off.record(network, train(data, CHOSEN), timed=False, progress=False)
    thresholds = dict[str, float]()
    for gate in trace.topology.gates:
        thresholds[gate] = float(np.quantile(trace.columns[f"score/{gate}"], GOES_ON))
    return off.Plan.by_hand(thresholds)


def recorded(network: off.Network, data: Path, engine: str, first: int, rows: int) -> off.Trace:
    """Rows of the test set on an engine."""
    source = f"cifar10:{data / 'cifar10'}[{first}:{first + rows}]"
    return off.record(network, source, engine=engine, timed=False, progress=False)


def promised(trace: off.Trace, held: off.Trace, at_most: float) -> dict[str, Any]:
    """A certified plan, and what it does on the rows for figures."""
    plan = off.calibrate(trace, risk="disagreement", at_most=at_most)
    done = held.evaluate(plan, risk="disagreement")
    price = held.price(plan)
    return {
        "plan": str(plan),
        "accuracy": done.accuracy,
        "plain_accuracy": done.plain_accuracy,
        "disagreement": done.risk.value if done.risk is not None else None,
        "cost": price.mean / price.plain,
    }


def beside(trace: off.Trace, wanted: off.Trace) -> dict[str, float]:
    """How the last exit answers beside that of float32."""
    last = f"logits/{trace.topology.exits[-1]}"
    logits = trace.columns[last]
    same = logits.argmax(1) == wanted.columns[last].argmax(1)
    return {
        "same": float(same.mean()),
        "apart": float(np.abs(logits - wanted.columns[last]).mean()),
    }


def timed(network: off.Network, x: Any, engines: dict[str, str], repeats: int) -> dict[str, Any]:
    """Milliseconds of the bare plain network on each engine, and ratios to float32."""
    found = dict[str, Any]()
    for batch in BATCHES:
        inputs = as_inputs(x[:batch])
        calls = dict[str, Callable[[], object]]()
        for name, text in engines.items():
            calls[name] = plain_call(network, inputs, engine_of(text)[0])
        calls["float32 again"] = calls["float32"]
        times = interleaved(calls, repeats=repeats, clock=time.process_time)
        for name, values in times.items():
            found[f"{name}, batch {batch}"] = {
                "ms": float(np.median(values)),
                "over_float32": vars(ratio(values, times["float32"])),
            }
    return found


def measured(case: str, data: Path, cache: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of a network."""
    network = ladder(data, (20, 56), "own") if case == "ladder" else four(data, cache)
    network.eval()
    scales = train(data, SCALES)
    found = dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        plan_for_scales(network, data).save(file)
        engines = {
            "float32": "onnxruntime",
            "int8": f"onnxruntime:int8={scales}",
            "int8, reach": f"onnxruntime:int8={scales},reach={file}",
        }
        wanted: off.Trace | None = None
        for name, text in engines.items():
            trace = recorded(network, data, text, CALIBRATION, args.rows)
            held = recorded(network, data, text, FIGURES, args.rows)
            wanted = wanted or held
            found[name] = {
                "accuracies": accuracies(held),
                **beside(held, wanted),
                **promised(trace, held, args.at_most),
            }
            print(f"\n{case}, {name}", flush=True)
            for key, value in found[name].items():
                print(f"  {key}: {value}", flush=True)
        x = off.rows(f"cifar10:{data / 'cifar10'}").take(np.arange(FIGURES, FIGURES + 64)).x
        # The scales of a plain network are those of all rows, as every row reaches it.
        del engines["int8, reach"]
        found["times"] = timed(network, x, engines, args.repeats)
    for name, value in found["times"].items():
        over = value["over_float32"]
        print(
            f"{case}, plain, {name}: {value['ms']:.2f} ms, {over['value']:.3f} "
            f"[{over['low']:.3f}, {over['high']:.3f}] of float32",
            flush=True,
        )
    return found


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("out"))
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--rows", type=int, default=2000, help="for each of promise and figures")
    parser.add_argument("--at-most", type=float, default=0.02)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = dict[str, Any]()
    for case in args.case or CASES:
        results[case] = measured(case, args.data, args.cache, args)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
