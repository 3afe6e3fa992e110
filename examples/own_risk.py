"""A risk of your own: how much the Brier score may rise, certified by the betting bound.

python examples/own_risk.py
"""

import numpy as np
import torch
from torch import nn

import offramp as off

torch.manual_seed(0)
torch.set_num_threads(1)


def brier_rise(outputs: np.ndarray, labels: np.ndarray, reference: int) -> np.ndarray:
    """Brier score of every exit minus that of the reference, [N, E], from logits [N, E, C]."""
    wide = outputs - outputs.max(-1, keepdims=True)
    p = np.exp(wide) / np.exp(wide).sum(-1, keepdims=True)
    score = ((p - np.eye(outputs.shape[-1])[labels][:, None]) ** 2).sum(-1)
    return score - score[:, [reference]]


risk = off.Risk(
    "brier_rise",
    -2.0,
    2.0,
    needs_labels=True,
    zero_at_reference=True,
    losses=brier_rise,
    reads="outputs",
)


class FirstHalf(nn.Module):
    """The best linear rule on the first half of the features: half the work."""

    def __init__(self, centers: torch.Tensor) -> None:
        super().__init__()
        self.rule = best_rule(centers[:, :8])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rule(x[:, :8])


def best_rule(centers: torch.Tensor) -> nn.Linear:
    """Bayes' rule for equally likely unit Gaussians around the centers [C, F]."""
    rule = nn.Linear(centers.shape[1], len(centers))
    with torch.no_grad():
        rule.weight.copy_(centers)
        rule.bias.copy_(-0.5 * centers.square().sum(1))
    return rule


centers = torch.randn(5, 16)
y = torch.randint(5, (6000,))
x = centers[y] + torch.randn(6000, 16)
net = off.ladder({"narrow": FirstHalf(centers), "wide": best_rule(centers)}).eval()
trace = off.record(net, (x.numpy(), y.numpy()), timed=False, progress=False)
plan = off.calibrate(trace[:4000], risk=risk, at_most=0.02)
print(plan)
print(trace[4000:].evaluate(plan, risk=risk))
