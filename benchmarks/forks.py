"""Forks: wall-clock of mixes of paths beside bare segments, and how often a promise on them is
broken.

    python benchmarks/forks.py [--rows 20000] [--draws 1000] [--repeats 21] [--json FILE]

Needs no data. Wall-clock: a ResNet-20 with a fork of two arms in its second stage, and one at 16,
24 and 32 pixels, at batch 64; thresholds send a quarter, half and three quarters of the rows the
cheap way. Promises: a population of rows whose true risk is known is recorded once; calibration
sets of 500 rows are drawn from it, a plan is certified on each, and its true risk compared with the
level. Once with all paths recorded, once at settings of one dial.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import offramp as off

# Internal: makers of models, which the face does not have yet.
from offramp.building.factories import make_model, preprocess_of

# Internal: plans of the path fixed beforehand, as calibrate walks it.
from offramp.calibration.path import UNKNOWN, shared_path

# Internal: the worst loss of every row under a plan.
from offramp.calibration.routed import RoutedOutcomes, few

# Internal: the test of a single plan.
from offramp.guarantees.bounds import find_bound, from_sums

# Internal: the risk that is promised.
from offramp.guarantees.risks import find_risk

# Internal: the walk along plans in a fixed order.
from offramp.guarantees.testing import fixed_sequence

# Internal: the same clock as `offramp bench`.
from offramp.runtime.benching import bench

SHARES = (0.25, 0.5, 0.75)
LEVELS = (0.25, 0.5, 0.75)  # of the risk of the plan that takes the first way everywhere


def fork() -> off.Network:
    """A ResNet-20 whose second stage has a cheap arm and a dear one."""
    torch.manual_seed(0)
    whole = make_model("offramp:resnet20")

    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = whole.conv1
            self.bn1 = whole.bn1
            self.layer1 = whole.layer1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer1(torch.relu(self.bn1(self.conv1(x))))

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer3 = whole.layer3
            self.linear = whole.linear

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.layer3(x).mean((2, 3)))

    low = nn.Sequential(nn.Conv2d(16, 32, 3, 2, padding=1), nn.ReLU())
    steps = [("stem", Stem().eval()), off.Fork("size", {"low": low.eval(), "high": whole.layer2})]
    return off.route([*steps, ("head", Head().eval())], example=torch.randn(4, 3, 32, 32))


def sized() -> off.Network:
    """A ResNet-20 at three sizes."""
    torch.manual_seed(0)
    x = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    spec = "offramp:resnet20"
    gate = "predictor?width=8&side=16&stride=1"
    return off.resolutions(
        make_model(spec), x, [16, 24, 32], gate=gate, preprocess=preprocess_of(spec), spec=spec
    )


def mixes(repeats: int) -> list[dict[str, Any]]:
    """Run over bare segments, for shares of rows that go the cheap way."""
    found = []
    for name, net, x in (
        ("fork in a ResNet-20", fork(), torch.randn(64, 3, 32, 32)),
        ("three sizes", sized(), torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)),
    ):
        (gate,) = net.topology.gates
        trace = off.record(net, x, timed=False, progress=False)
        for share in SHARES:
            thresholds = []
            for column in net.topology.score_columns(gate):
                part = share if net.topology.routes(gate) == 1 else share / 2
                thresholds.append(float(np.quantile(trace.columns[column], 1 - part)) + 1e-6)
            plan = off.Plan.by_hand({gate: tuple(thresholds)})
            (line,) = bench(
                net, plan, x, batches=(64,), repeats=repeats, clock=time.process_time
            ).lines
            found.append(
                {
                    "what": name,
                    "share": share,
                    "run_ms": line.run_ms,
                    "parts_ms": line.parts_ms,
                    "plain_ms": line.plain_ms,
                    "over_parts": str(line.over_parts),
                    "over_plain": str(line.over_plain),
                    "same": str(line.same),
                }
            )
    return found


def population(rows: int, settings: list[float] | None) -> off.Trace:
    """Rows of a small network with two forks and an exit; which rows change their answer depends on
    the scores.
    """
    torch.manual_seed(1)

    def part() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 12)).eval()

    x = torch.randn(rows, 12)
    steps = [
        ("stem", part()),
        off.Fork("first", {"skip": [], "unit": part()}),
        off.Fork("second", {"low": nn.Linear(12, 12).eval(), "high": part()}),
        ("head", nn.Linear(12, 4).eval()),
    ]
    net = off.route(steps, example=x[:4])
    return off.record(net, x, timed=False, progress=False, settings=settings, batch_size=2000)


def path_scores(trace: off.Trace) -> np.ndarray:
    """All scores of a trace, from which settings of a dial are taken."""
    return np.concatenate(
        [column for name, column in trace.columns.items() if name.startswith("score/")]
    )


def broken(rows: int, draws: int, size: int = 500) -> list[dict[str, Any]]:
    """Shares of draws whose certified plan breaks its promise; binomial bound, 90 % confidence."""
    risk = find_risk("disagreement")
    bound = find_bound("binomial", risk)
    found = []
    trace = population(rows, None)
    path = few(shared_path([UNKNOWN]), size)
    width = sum(trace.topology.routes(gate) for gate in trace.topology.gates)
    thresholds = np.repeat(np.append(np.float32(np.inf), path)[:, None], width, axis=1)
    routed = RoutedOutcomes(thresholds, trace, trace.losses(risk))
    # [P, N]
    worst = np.stack([routed.worst(plan) for plan in range(len(thresholds))]).astype(np.int8)
    true = worst.mean(1)  # the band counts as a loss: at most a little more than the true risk
    for share in LEVELS:
        level = float(share * true[-1])
        rng = np.random.default_rng(0)
        bad = 0
        saved = 0
        for _ in range(draws):
            picks = rng.choice(worst.shape[1], size, replace=False)
            p = from_sums(
                bound, worst[:, picks].sum(1, dtype=float), size, level, low=0.0, high=1.0
            )
            p[0] = 0.0
            passed = fixed_sequence(p, 0.1)
            bad += true[passed - 1] > level
            saved += passed > 1
        found.append(
            {
                "way": "all paths",
                "level": level,
                "draws": draws,
                "broken": bad / draws,
                "found": saved / draws,
            }
        )
    finite = np.quantile(path_scores(trace), np.linspace(0.98, 0.02, 12)).tolist()
    dial = population(rows, finite)
    losses = dial.losses(risk)
    for share in LEVELS:
        level = float(share * losses[:, -1].mean())
        rng = np.random.default_rng(1)
        bad = 0
        saved = 0
        for _ in range(draws):
            picks = rng.choice(len(dial), size, replace=False)
            some = dial[picks]
            try:
                plan = off.calibrate(
                    some, risk="disagreement", at_most=level, confidence=0.9, repeats="independent"
                )
            except off.errors.NoSafePlan:
                continue
            saved += 1
            bad += losses[:, dial.setting_of(plan)].mean() > level
        line = {"way": "one dial", "level": level, "draws": draws}
        found.append({**line, "broken": bad / draws, "found": saved / draws})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    times = mixes(options.repeats)
    promises = broken(options.rows, options.draws)
    for title, lines in (
        ("batch 64, processor time on one thread", times),
        ("promises at 90 % confidence", promises),
    ):
        table = Table(title=title)
        for column in lines[0]:
            table.add_column(column)
        for line in lines:
            table.add_row(
                *[
                    f"{value:.3g}" if isinstance(value, float) else str(value)
                    for value in line.values()
                ]
            )
        Console(width=140).print(table)
    if options.json:
        options.json.write_text(
            json.dumps({"times": times, "promises": promises}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
