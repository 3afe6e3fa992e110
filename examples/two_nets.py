"""Two trained nets, a promise, and a batch that skips the work: the whole of offramp on
scikit-learn's digits.

python examples/two_nets.py
"""

import torch
from torch import nn

import offramp as off

torch.manual_seed(0)
torch.set_num_threads(1)
digits = off.rows("digits")
train, held_out, test = (
    digits.select(slice(*ends)) for ends in ((0, 700), (700, 1400), (1400, 1797))
)


class Scale(nn.Module):
    """What stands before both nets: uint8 images [B, 1, 8, 8] -> floats."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float() / 16


def train_model(model: nn.Module, epochs: int) -> nn.Module:
    """Plain training; bring your own."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for batch in train.batches(50):
            x = Scale()(torch.as_tensor(batch.x))
            y = torch.as_tensor(batch.y)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


small = train_model(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), epochs=10)
convolutions = (
    nn.Conv2d(1, 32, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(32, 64, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
)
large = train_model(nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(1024, 10)), epochs=15)

net = off.ladder({"small": (small, Scale()), "large": (large, Scale())}).eval()
trace = off.record(net, held_out, timed=False, progress=False)
plan = off.calibrate(trace, risk="accuracy_gap", at_most=0.03)
print(plan)

x = torch.as_tensor(next(test.batches(8)).x)
answers = off.run(net, plan, x)
print("answers", answers.logits.argmax(1).tolist())
print("left at", [net.topology.exits[index] for index in answers.exit.tolist()])
print(off.record(net, test, timed=False, progress=False).evaluate(plan))
