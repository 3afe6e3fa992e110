"""Answers as they come, and answers by a deadline.

python examples/anytime_and_deadline.py
"""

import torch
from torch import nn

import offramp as off

torch.manual_seed(0)
torch.set_num_threads(1)
small = nn.Sequential(nn.Linear(64, 10))
large = nn.Sequential(
    nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10)
)
net = off.ladder({"small": small, "large": large}).eval()
x = torch.randn(256, 64)

plan = off.Plan.by_hand({"small": 1.0})  # leave at a margin of 1: set by hand, no promise
runner = off.open(net, plan, timing_rows=x)  # every part is timed, for deadlines

for answers in runner.anytime(x):
    print("anytime:", answers.logits.shape, "from", net.topology.exits[int(answers.exit[0])])

for deadline_ms in (0.0, 10_000.0):  # none at all, and all the time in the world
    why = runner(x, deadline_ms=deadline_ms).reasons()
    print(
        f"deadline {deadline_ms:g} ms:", {reason: why.count(reason) for reason in sorted(set(why))}
    )
