"""B-LeNet on MNIST by joint training, beside plain LeNet: accuracy, what leaves at the branch,
wall-clock.

    python benchmarks/lenet.py --data DIR [--cache out] [--seeds 3] [--engine onnxruntime]
        [--json FILE]

DIR holds mnist/ (see benchmarks/fetch.py). Two phases as in the BranchyNet paper, with fewer epochs
and a rate that falls to 0 in each: LeNet alone, then LeNet and branch together from there. Plain
LeNet gets as many epochs in all. Thresholds are entropies in nats, fixed beforehand (0.5 of a
re-implementation, 0.025 of the paper). The certified plan comes from test rows 0-4,999 and is
measured on 5,000-9,999; accuracies at fixed thresholds are over all 10,000. Networks are kept in
the cache.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import offramp as off

# Internal: the frontier that a paper draws, which is no plan.
from offramp.calibration.branchynet_grid import above, grid_plans

# Internal: the frontier that a paper draws, which is no plan.
from offramp.calibration.branchynet_grid import front as front_through
from offramp.contracts import Phase

# Internal: the baseline is given what the network is given.
from offramp.networks.inputs import as_inputs
from offramp.recipes.joint import Joint

# Internal: the same clock as `offramp bench`.
from offramp.runtime.benching import bench, plain_call

# Internal: the bare call of an engine is the baseline.
from offramp.runtime.engine import engine_of

# Internal: times taken in turn, as in our own figures.
from offramp.runtime.measuring import interleaved, ratio

ENTROPIES = (0.025, 0.1, 0.5)


class Alone(Joint):
    """The first phase of `Joint` and nothing else: plain training of the model, by the same
    optimizer.
    """

    def phases(self, network: off.Network) -> list[Phase]:
        return [phase for phase in super().phases(network) if phase.name != "joint"]


def untrained(seed: int, example: Any) -> off.Network:
    """A LeNet with BranchyNet's branch, nothing trained."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        spec = "offramp:lenet"
        return off.cut(
            off.make_model(spec),
            example,
            at=["conv1"],
            exits="b_lenet",
            gate="neg_entropy",
            preprocess=off.make_preprocess(spec),
            spec=spec,
        )


def networks(
    data: Path, cache: Path, seed: int, alone: int, joint: int
) -> tuple[off.Network, off.Network]:
    """Plain LeNet (under the untrained branch) and B-LeNet, from the cache or trained now."""
    train = off.rows(f"mnist/train:{data / 'mnist'}")
    example = train.take(np.arange(8)).x
    found = []
    for name, recipe in (
        ("plain", Alone(alone=alone + joint, decay=True)),
        ("branchy", Joint(alone=alone, epochs=joint, decay=True)),
    ):
        path = cache / f"lenet-{name}-{alone}-{joint}-{seed}"
        if not path.exists():
            net = untrained(seed, example)
            print(off.fit(net, train, recipe=recipe, batch_size=256, seed=seed), flush=True)
            off.save(net, path)
        found.append(off.load(path))
    return found[0], found[1]


def right(network: off.Network, rows: off.Rows | Any) -> float:
    """The accuracy of a network's last exit."""
    hits = 0
    with torch.inference_mode():
        for batch in rows.batches(500):
            logits = network(as_inputs(batch.x)["x"])[-1]
            hits += int((logits.argmax(1).numpy() == batch.y).sum())
    return hits / len(rows)


def measured(data: Path, cache: Path, seed: int, alone: int, joint: int) -> dict[str, Any]:
    """Everything but wall-clock, for one seed."""
    plain, branchy = networks(data, cache, seed, alone, joint)
    test = off.rows(f"mnist:{data / 'mnist'}")
    trace = off.record(branchy, test, timed=False)
    found: dict[str, Any] = {
        "seed": seed,
        "plain": right(plain, test),
        "last exit": right(branchy, test),
    }
    for entropy in ENTROPIES:
        threshold = float(above(-entropy, trace.scores[:, 0]))
        done = trace.evaluate(off.Plan.by_hand({"conv1": threshold}))
        found[f"entropy {entropy}"] = {"accuracy": done.accuracy, "leave": done.shares[0]}
    plan = off.calibrate(trace[:5000], risk="accuracy_gap", at_most=0.003)
    done = trace[5000:].evaluate(plan, risk="accuracy_gap")
    found["certified"] = {"accuracy": done.accuracy, "leave": done.shares[0], "plan": str(plan)}
    points = front_through(grid_plans(trace[:5000], grid="lenet"))
    found["screening"] = [[one.accuracy, one.cost, dict(one.thresholds)] for one in points]
    return found


def speed(
    data: Path,
    cache: Path,
    alone: int,
    joint: int,
    repeats: int,
    engine: str,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Wall-clock of B-LeNet at entropy 0.5 beside plain LeNet on the same engine, in one run, and
    what bounds it.
    """
    _, branchy = networks(data, cache, 0, alone, joint)
    rows = off.rows(f"mnist:{data / 'mnist'}").take(np.arange(5000, 7000)).x
    plan = off.Plan.by_hand({"conv1": -0.5})
    result = bench(
        branchy, plan, rows, batches=(1, 64), repeats=repeats, engine=engine, clock=clock
    )
    print(f"{engine_of(engine)[1]}\n{result}")
    engine_stages = functions(branchy, plan, rows, repeats, engine, clock)
    return {"engine": engine_of(engine)[1], **result.to_json(), "pieces": engine_stages}


def functions(
    branchy: off.Network,
    plan: off.Plan,
    rows: Any,
    repeats: int,
    engine: str,
    clock: Callable[[], float],
) -> list[dict[str, Any]]:
    """Milliseconds of the segments of a plan, each on whole batches, beside the plain network: what
    a run consists of.

    If every row left at the branch, and a Runner took no time, the speed-up would be plain / first.
    """
    shelved = engine_of(engine)[0]
    found = list[dict[str, Any]]()
    engine_stages = shelved.open(branchy, plan.schedule(branchy.topology), branchy.device())
    for batch in (1, 64):
        state = dict(as_inputs(rows[:batch]))
        calls = {"plain": plain_call(branchy, as_inputs(rows[:batch]), shelved)}
        with torch.inference_mode():
            for engine_stage in engine_stages:
                calls[engine_stage.name] = partial(engine_stage.call, dict(state))
                engine_stage.call(state)
            times = interleaved(calls, repeats=repeats * 3, warmup=3, clock=clock)
        found.append({"batch": batch, **{name: float(np.median(ms)) for name, ms in times.items()}})
        first = ratio(times["plain"], times[engine_stages[0].name])
        told = ", ".join(f"{name} {ms:.3f} ms" for name, ms in found[-1].items() if name != "batch")
        print(f"batch {batch}: {told}; at most {first} times as fast")
    return found


def show(seeds: list[dict[str, Any]], console: Console) -> None:
    """A row per seed."""
    table = Table(
        "seed",
        "plain LeNet",
        "last exit",
        *(f"entropy {e}: accuracy, leave" for e in ENTROPIES),
        "certified",
    )
    for one in seeds:
        cells = [
            f"{one[f'entropy {e}']['accuracy']:.2%}, {one[f'entropy {e}']['leave']:.2%}"
            for e in ENTROPIES
        ]
        certified = f"{one['certified']['accuracy']:.2%}, {one['certified']['leave']:.2%}"
        table.add_row(
            str(one["seed"]), f"{one['plain']:.2%}", f"{one['last exit']:.2%}", *cells, certified
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("out"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--alone", type=int, default=8, help="epochs of LeNet alone (8; the paper's code has 50)"
    )
    parser.add_argument(
        "--joint",
        type=int,
        default=16,
        help="epochs of both together (16; the paper's code has 100)",
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--engine", default="torch", help="of the wall-clock: torch, onnxruntime, ..."
    )
    parser.add_argument(
        "--threads", type=int, help="of the wall-clock; by default as many as torch takes"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="processor time instead of wall-clock, for one thread",
    )
    parser.add_argument("--no-speed", action="store_true", help="leave wall-clock out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    train = partial(measured, args.data, args.cache, alone=args.alone, joint=args.joint)
    results: dict[str, Any] = {"seeds": [train(seed=seed) for seed in range(args.seeds)]}
    if results["seeds"]:
        show(results["seeds"], Console(width=150))
    if not args.no_speed:
        results["speed"] = speed(
            args.data, args.cache, args.alone, args.joint, args.repeats, args.engine, clock
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
