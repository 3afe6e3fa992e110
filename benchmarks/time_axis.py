"""SST-2 read chunk by chunk by a recurrent model: the share of tokens that is read, under a
certified plan.

    python benchmarks/time_axis.py --data DIR [--cache out] [--chunk 4] [--seed 0] [--json FILE]

DIR holds sst2/{train,dev}.tsv; texts are those of benchmarks/sst2_texts.py. A GRU of 128 units
learns from phrases, with one head after every chunk. The first half of dev.tsv calibrates, the
second gives the figures; 200 random halves tell how far they depend on the rows. "all read" lets
only ended texts leave: its tokens count as 1.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sst2_texts import prepared
from torch import Tensor, nn

import offramp as off
from offramp.errors import NoSafePlan
from offramp.recipes.joint import Joint

LONGEST = 48
WIDTH = 128
CLASSES = 2
ASKED = (
    ("disagreement", 0.02),
    ("disagreement", 0.05),
    ("accuracy_gap", 0.03),
    ("accuracy_gap", 0.05),
)
ENDED = 1.5  # a threshold that only ended texts reach: probabilities end at 1


class Reader(nn.Module):
    """Words, dropout and a GRU; the state after a chunk is the one after its last word."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, WIDTH, padding_idx=0)
        self.drop = nn.Dropout(0.3)
        self.cell = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, state: Tensor, chunk: Tensor, mask: Tensor) -> Tensor:
        """[B, F], [B, c], [B, c] -> [B, F]."""
        states, _ = self.cell(self.drop(self.words(chunk)), state[None].contiguous())  # [B, c, F]
        count = (mask != 0).sum(1)
        last = (count - 1).clamp(min=0)[:, None, None].expand(-1, 1, WIDTH)
        return torch.where(count[:, None] > 0, states.gather(1, last)[:, 0], state)


def network(words: int, example: Any, chunk: int, seed: int) -> off.Network:
    """The untrained network."""
    torch.manual_seed(seed)
    head = nn.Sequential(nn.Dropout(0.2), nn.Linear(WIDTH, CLASSES)).eval()
    return off.along_time(
        Reader(words).eval(),
        head,
        example,
        state=WIDTH,
        chunk=chunk,
        mask="attention_mask",
        gate="max_prob",
    )


def tokens_read(trace: off.Trace, plan: off.Plan, lengths: np.ndarray, chunk: int) -> float:
    """The share of tokens that was read."""
    exits = trace.replay(plan).exit
    read = np.minimum(lengths, (exits + 1) * chunk)
    return float(read.sum() / lengths.sum())


def measured(trace: off.Trace, plan: off.Plan, lengths: np.ndarray, chunk: int) -> dict[str, float]:
    """Tokens, accuracy and disagreement with the text read to its end."""
    replay = trace.replay(plan)
    assert trace.labels is not None
    last = trace.answers[:, -1]
    return {
        "tokens": tokens_read(trace, plan, lengths, chunk),
        "accuracy": float((replay.answer == trace.labels).mean()),
        "all read": float((last == trace.labels).mean()),
        "disagreement": float((replay.answer != last).mean()),
    }


def over_halves(
    trace: off.Trace, lengths: np.ndarray, chunk: int, risk: str, level: float, count: int
) -> dict[str, Any]:
    """A promise on the fixed halves, and over random ones."""
    rng = np.random.default_rng(20)
    middle = len(trace) // 2
    orders = [np.arange(len(trace)), *(rng.permutation(len(trace)) for _ in range(count))]
    found = list[dict[str, float]]()
    said = ""
    for number, order in enumerate(orders):
        rows = order[:middle]
        test = order[middle:]
        certified = 1.0
        try:
            plan = off.calibrate(trace[rows], risk=risk, at_most=level)
        except NoSafePlan as nothing:
            plan = off.Plan.by_hand(dict.fromkeys(trace.topology.gates, ENDED))
            certified = 0.0
            said = said or str(nothing)
        if number == 0:
            said = said or str(plan)
        found.append(measured(trace[test], plan, lengths[test], chunk) | {"certified": certified})
    spread = {
        name: np.quantile([one[name] for one in found[1:]], [0.05, 0.5, 0.95]).tolist()
        for name in ("tokens", "accuracy")
    }
    gap = [
        one["disagreement"] if risk == "disagreement" else one["all read"] - one["accuracy"]
        for one in found[1:]
    ]
    return {
        "risk": risk,
        "at most": level,
        "plan": said,
        "fixed": found[0],
        "over halves": spread,
        "certified": float(np.mean([one["certified"] for one in found[1:]])),
        "above the level on the other half": float((np.array(gap) > level).mean()),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("out"))
    parser.add_argument("--chunk", type=int, default=4)
    parser.add_argument(
        "--rows", type=int, nargs=2, default=(12000, 8000), help="short and long phrases that train"
    )
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--halves", type=int, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    specs, words = prepared(args.data, args.cache, tuple(args.rows))
    specs = {
        name: f"{spec.rpartition('length=')[0]}length={LONGEST}" for name, spec in specs.items()
    }
    dev = off.rows(specs["dev"])
    every = dev.take(np.arange(len(dev)))
    net = network(
        words,
        {name: torch.as_tensor(value[:4]) for name, value in every.x.items()},
        args.chunk,
        args.seed,
    )
    kept = args.cache / f"time-axis-{args.chunk}-{args.seed}.pt"
    if kept.exists():
        net.load_state_dict(torch.load(kept, weights_only=True))
    else:
        for number in range(args.epochs):
            for part in ("short", "long"):
                recipe = Joint(1.0, epochs=1, rate=2e-3 * 0.5**number)
                off.fit(
                    net, specs[part], recipe=recipe, batch_size=128, seed=args.seed, progress=False
                )
                print(f"epoch {number + 1}, {part} phrases: done", flush=True)
        torch.save(net.state_dict(), kept)
    trace = off.record(net, specs["dev"], timed=False, progress=False)
    lengths = every.x["attention_mask"].sum(1)
    plain = off.Plan.by_hand(dict.fromkeys(trace.topology.gates, ENDED))
    middle = len(trace) // 2
    results: dict[str, Any] = {
        "settings": {
            "chunk": args.chunk,
            "seed": args.seed,
            "words": words,
            "mean length": float(lengths.mean()),
        },
        "all read": measured(trace[middle:], plain, lengths[middle:], args.chunk),
        "promises": [
            over_halves(trace, lengths, args.chunk, *asked, args.halves) for asked in ASKED
        ],
        "thresholds": {},
    }
    for threshold in (0.8, 0.9, 0.95, 0.98, 0.99, 0.995):
        plan = off.Plan.by_hand(dict.fromkeys(trace.topology.gates, threshold))
        results["thresholds"][threshold] = measured(trace, plan, lengths, args.chunk)
    plan = off.Plan.by_hand(dict.fromkeys(trace.topology.gates, 0.95))
    batch = {name: torch.as_tensor(value) for name, value in every.x.items()}
    run = off.run(net, plan, batch)
    replay = trace.replay(plan)
    results["run other than replay"] = int((run.exit.numpy() != replay.exit).sum())
    print(json.dumps(results, indent=1))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
