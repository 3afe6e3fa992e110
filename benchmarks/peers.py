"""offramp beside its peers in one run: earlyon, a whole-batch exit, and a smaller static network at
equal cost.

    pip install earlyon
    python benchmarks/peers.py --data DIR [--splits 200] [--repeats 9] [--only timings|plans]
        [--json FILE]

Same network, weights, thresholds and rows on all sides: ResNet-56 cut at layer1 and layer2, once
with exits of earlyon's own kind (mean over positions, 128 hidden units, trained by its own
trainer), once with offramp's linear_grid exits trained by cross-entropy; for the timings also the
model of earlyon's README, `resnet50_ee`, with seeded weights. DIR holds cifar10/ and weights/ (see
benchmarks/fetch.py). Rows of the test set: 0-999 fit temperatures, splits of 1,000-9,999 calibrate
(4,000) and give the figures (5,000). Costs are MACs, exits and gates included, in units of plain
ResNet-56. earlyon is calibrated in every setting of peers_earlyon.py; searches are timed on logits
recorded before. A target is broken when accuracy on rows not seen falls further than asked: on the
5,000 other rows of a split, and on all 9,000 when the 4,000 are drawn from them with replacement,
where nothing is left to chance but the draw. A plan without a promise aims at the edge, whoever
chose it, and misses its target often; a certified one may do so in 5 %.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ladder import CALIBRATION, DEVELOPMENT
from ladder import trace_of as ladder_trace
from peers_earlyon import (
    SETTINGS,
    as_exit,
    calibrated,
    earlyon,
    fractions_of,
    own_head,
    trained,
    wrapped,
)
from peers_plans import plans_of
from peers_speed import contest, lines, quick_start
from rich.console import Console
from rich.table import Table

import offramp as off
from exits import AT, network, trace_of

# Internal: a step of the loop is measured alone.
from offramp.fitting.loader import index_of

# Internal: a step of the loop is measured alone.
from offramp.fitting.pooling import Pooling

# Internal: a step of the loop is measured alone.
from offramp.networks.recipe import poolable

WIDTHS = dict(zip(AT, (16, 32), strict=True))
EPOCHS = 20  # of earlyon's trainer, by default


def own_kind(data: Path, cache: Path) -> off.Network:
    """ResNet-56 with heads of earlyon's kind, from the cache or trained now by earlyon on features
    computed once.
    """
    path = cache / "peers-56-heads"
    if path.exists():
        return off.load(path)
    ours, _ = network(data, cache, 56, "cross-entropy")
    train = off.rows(f"cifar10/train:{data / 'cifar10'}")
    row_index = index_of(train, progress=True)
    columns = Pooling(ours, poolable(ours), 1, None, folder=cache).features(
        train, row_index.seen.fingerprint
    )
    # means come first in a grid
    means = {name: column[:, : WIDTHS.get(name, 10)] for name, column in columns.items()}
    assert row_index.y is not None
    heads = trained(means, row_index.y, EPOCHS)
    exits = {name: as_exit(head) for name, head in zip(AT, heads, strict=True)}
    spec = "offramp:resnet56"
    model = off.make_model(spec, data / "weights" / "cifar10_resnet56.safetensors")
    net = off.cut(
        model,
        train.take(np.arange(8)).x,
        at=AT,
        exits=exits,
        gate="max_prob",
        preprocess=off.make_preprocess(spec),
        spec=spec,
    )
    net.trained_on = row_index.seen
    off.save(net, path)
    return net


def timings(
    data: Path, net: off.Network, drop: float, trace: off.Trace, repeats: int, pixels: int
) -> dict[str, Any]:
    """Wall-clock on ResNet-56 with earlyon's heads and on the model of its README."""
    rows = off.rows(f"cifar10:{data / 'cifar10'}").take(np.arange(5000, 6000)).x
    assert isinstance(rows, np.ndarray)
    member = net.members[0]
    x = torch.as_tensor(rows)
    preprocess = net.preprocess_of(member)
    assert preprocess is not None
    heads = [own_head(WIDTHS[name], net.exit_of(name)).eval() for name in AT]
    ours = contest(net.model_of(member), preprocess, AT, heads, x, "cifar")
    found = calibrated(
        trace[CALIBRATION],
        trace[DEVELOPMENT],
        SETTINGS["confidence"],
        drop,
        fractions_of(ours.wrapper, AT),
    )
    plan = {
        f"thresholds by earlyon for {drop:.1%}": [found.plan.thresholds[gate][0] for gate in AT]
    }
    model, enlarged = quick_start(rows[:256], pixels)
    return {
        "ResNet-56, earlyon's heads": lines(ours, x, plan, repeats),
        f"resnet50_ee at {pixels} pixels, seeded weights": lines(model, enlarged, {}, repeats),
    }


def show(results: Mapping[str, Any], console: Console) -> None:
    """A table of timings per model, then two of plans per network."""
    for title, rows in results.get("timings", {}).items():
        names = [
            "offramp / earlyon",
            "offramp / earlyon, row by row",
            "offramp / whole batch",
            "offramp / plain",
        ]
        names += ["earlyon / plain", "plain / plain"]
        table = Table("rows", "left", "offramp ms", *names, title=title)
        for name, row in rows.items():
            cells = [
                "{value:.2f} [{low:.2f}, {high:.2f}]".format(**row[one]) if one in row else ""
                for one in names
            ]
            table.add_row(
                name, "/".join(map(str, row["left"])), f"{row['ms']['offramp']:.1f}", *cells
            )
        console.print(table)
    for title, result in results.get("plans", {}).items():
        heads = (
            "cost: 5, 50, 95 %",
            "drop",
            "beside static",
            "broken",
            "broken of all",
            "search s",
            "cost at batch 64",
        )
        table = Table("way", *heads, title=f"{title}: accuracy may fall by {results['drop']:.1%}")
        for name, row in result["ways"].items():
            spread = [", ".join(f"{value:.3f}" for value in row[key]) for key in ("cost", "drop")]
            shares = [f"{row[key]:.0%}" for key in ("broken", "broken_of_population")]
            if "batch 64" in row:
                whole = f"{row['batch 64']['cost']:.3f}"
            else:
                whole = f"{row['cost'][1]:.3f}"
            lead = f"{row['lead_over_static'][1]:+.2%}"
            table.add_row(name, *spread, lead, *shares, f"{row['seconds']:.3f}", whole)
        console.print(table)
        table = Table(
            "cost at equal accuracy, no promise",
            "earlyon",
            "offramp, probability",
            "offramp, margin",
        )
        for name, row in result["equal_accuracy"].items():
            table.add_row(name, *(f"{value:.3f}" for value in row.values()))
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("out"))
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--drop", type=float, default=0.01, help="of accuracy, asked of every side (0.01)"
    )
    parser.add_argument(
        "--pixels",
        type=int,
        default=64,
        help="side of the images of resnet50_ee (64; 224 is its own)",
    )
    parser.add_argument("--only", choices=("timings", "plans"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    net = own_kind(args.data, args.cache)
    trace = trace_of(args.data, args.cache, "peers-56-heads", lambda: net)
    results: dict[str, Any] = {
        "earlyon": earlyon().__version__,
        "torch": torch.__version__,
        "drop": args.drop,
    }
    results["threads"] = torch.get_num_threads()
    if args.only != "plans":
        results["timings"] = timings(args.data, net, args.drop, trace, args.repeats, args.pixels)
    if args.only != "timings":
        ours = trace_of(
            args.data,
            args.cache,
            "56-cross-entropy",
            lambda: network(args.data, args.cache, 56, "cross-entropy")[0],
        )
        static = ladder_trace(args.data, args.cache, (20, 32), "own")
        heads = [own_head(WIDTHS[name]) for name in AT]
        model = wrapped(
            net.model_of(net.members[0]), AT, heads, SETTINGS["confidence"], (3, 32, 32)
        )
        fractions = fractions_of(model, AT)
        both = {"earlyon's heads": trace, "linear_grid exits": ours}
        results["plans"] = {
            k: plans_of(one, static, args.drop, fractions, args.splits) for k, one in both.items()
        }
    show(results, Console(width=170))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
