"""Write the golden files: once per schema version, by the version that is frozen in them.

python tests/golden/write_golden.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import offramp as off
from offramp.factories import make_gate
from offramp.gates.tempered import Tempered
from offramp.layers.front import Front
from offramp.models.digits import digits_small
from offramp.network import Network

HERE = Path(__file__).parent
SPEC = "offramp:digits_small"


def rows(count: int = 60) -> np.ndarray:
    """Images uint8 [count, 1, 8, 8] from a raw stream, the same for ever."""
    raw = np.random.Philox(0).random_raw(count * 64).reshape(count, 1, 8, 8)
    return (raw % np.uint64(17)).astype(np.uint8)


def network() -> Network:
    """Two small rungs with fronts, a tempered gate, mean answers."""
    torch.manual_seed(0)
    small, large = (digits_small().eval() for _ in range(2))
    fronts = Front(scale=16.0, expects=(8, 8)), Front((0.5,), (0.25,), scale=16.0)
    return off.ladder(
        {"small": (small, fronts[0]), "large": (large, fronts[1])},
        gate=Tempered(make_gate("margin"), 2.0),
        answer="mean",
        specs={"small": SPEC, "large": SPEC},
    ).eval()


def main() -> None:
    """network/, trace.npz and plan.json beside this file."""
    net = network()
    off.save(net, HERE / "network")
    trace = off.record(net, (rows(), np.arange(60) % 10), timed=False)
    trace.save(HERE / "trace.npz")
    off.calibrate(trace, risk="disagreement", at_most=0.7, against="backbone").save(HERE / "plan.json")


if __name__ == "__main__":
    main()
