"""Write the golden files: once per schema version, by the version that is frozen in them.

python tests/golden/write_golden.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import offramp as off
from offramp.building.factories import make_gate
from offramp.gates.tempered import Tempered
from offramp.layers.preprocess import Preprocess
from offramp.models.digits import digits_small
from offramp.networks.network import Network

HERE = Path(__file__).parent
SPEC = "offramp:digits_small"


def rows(count: int = 60) -> np.ndarray:
    """Images uint8 [count, 1, 8, 8] from a raw stream, the same for ever."""
    raw = np.random.Philox(0).random_raw(count * 64).reshape(count, 1, 8, 8)
    return (raw % np.uint64(17)).astype(np.uint8)


def network() -> Network:
    """Two small members with preprocessing, a tempered gate, mean answers."""
    torch.manual_seed(0)
    small, large = (digits_small().eval() for _ in range(2))
    fronts = Preprocess(scale=16.0, expects=(8, 8)), Preprocess((0.5,), (0.25,), scale=16.0)
    return off.ladder(
        {"small": (small, fronts[0]), "large": (large, fronts[1])},
        gate=Tempered(make_gate("margin"), 2.0),
        answer="mean",
        sources={"small": SPEC, "large": SPEC},
    ).eval()


def heads() -> Network:
    """Exits `attentive` and gates `uncertainty`: first_heads is what the first edition, c4fa37b,
    wrote of them.
    """
    torch.manual_seed(3)
    model = digits_small().eval()
    x = torch.from_numpy(rows(8)).float() / 16
    net = off.cut(model, x, at=["0", "2"], exits="attentive", gate="uncertainty", spec=SPEC)
    with torch.no_grad():
        for value in net.exits.parameters():
            value.add_(0.3 * torch.randn(value.shape))
        for key, value in net.exits.state_dict().items():
            if "running_mean" in key:
                value.add_(0.2 * torch.randn(value.shape))
        net.gates["0"].unit.weight.copy_(torch.tensor([[2.0, -0.5, 1.0, 0.25]]))
        net.gates["2"].unit.bias.fill_(0.75)
    return net


def main() -> None:
    """network/, first_heads/, trace.npz and plan.json beside this file."""
    off.save(heads(), HERE / "first_heads")
    net = network()
    off.save(net, HERE / "network")
    trace = off.record(net, (rows(), np.arange(60) % 10), timed=False)
    trace.save(HERE / "trace.npz")
    off.calibrate(trace, risk="disagreement", at_most=0.7, reference="backbone").save(
        HERE / "plan.json"
    )


if __name__ == "__main__":
    main()
