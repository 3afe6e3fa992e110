"""Exits inside one trained net: cut it at two places, train the exits with a plain loop, promise,
run.

python examples/cut_and_train.py
"""

import torch
from torch import nn

import offramp as off

torch.manual_seed(0)
torch.set_num_threads(1)
digits = off.rows("digits")
train, held_out, test = (
    digits.select(slice(*ends)) for ends in ((0, 800), (800, 1500), (1500, 1797))
)


class Net(nn.Module):
    """uint8 images [B, 1, 8, 8] -> logits [B, 10]; the last stage costs most."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU())
        self.stage3 = nn.Sequential(nn.Conv2d(32, 96, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(96 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stage3(self.stage2(self.stage1(x.float() / 16))).flatten(1))


def train_model(parameters, answers, epochs: int) -> None:
    """Plain training: cross-entropy of everything that `answers` gives for a batch."""
    optimizer = torch.optim.Adam(parameters, 3e-3)
    for _ in range(epochs):
        for batch in train.batches(50):
            optimizer.zero_grad()
            y = torch.as_tensor(batch.y)
            sum(
                nn.functional.cross_entropy(logits, y)
                for logits in answers(torch.as_tensor(batch.x))
            ).backward()
            optimizer.step()


model = Net()
train_model(model.parameters(), lambda x: [model(x)], epochs=10)

net = off.cut(model.eval(), next(train.batches(4)).x, at=["stage1", "stage2"])
net.backbone.requires_grad_(False)  # frozen: only the exits learn
train_model(net.exits.parameters(), lambda x: net(x)[:-1], epochs=15)

trace = off.record(net, held_out, timed=False, progress=False)
plan = off.calibrate(trace, risk="accuracy_gap", at_most=0.03)
print(plan)

x = torch.as_tensor(next(test.batches(8)).x)
answers = off.run(net, plan, x)
print("answers", answers.logits.argmax(1).tolist())
print("left at", [net.topology.exits[index] for index in answers.exit.tolist()])
print(off.record(net, test, timed=False, progress=False).evaluate(plan))
