"""What zoo.py measures of a model that was cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import offramp as off
from offramp.errors import OfframpError

# Internal: the baseline is given what the network is given.
from offramp.networks.inputs import as_inputs, given

# Internal: what a model answers is found as the package finds it.
from offramp.networks.taps import logits_in

# Internal: the places of cuts themselves are counted.
from offramp.partition.segmenting import points_of

# Internal: the decision rule and its float band are compared.
from offramp.plans.plan import Plan

BAND, OTHERS = 1e-4, (9, 12, 24)  # the float band; lengths of text beside that of the example


def some(example: Any, rows: Any) -> Any:
    """Rows of a batch, in any of the forms that it may have."""
    return given({name: value[rows] for name, value in as_inputs(example).items()})


def eager(model: nn.Module, x: Any) -> Tensor:
    """The logits [B, C] of the model as it stands."""
    with torch.no_grad():
        return logits_in(model(**x) if isinstance(x, dict) else model(x))


def legal(model: nn.Module, example: Any) -> int:
    """How many modules are legal cuts."""
    return sum(point.legal for point in points_of(model, None, as_inputs(example)))


def distance(one: Tensor, other: Tensor) -> float:
    """Largest difference, divided by max(1, largest magnitude)."""
    if one.numel():
        return float((one - other).abs().max() / one.abs().max().clamp(min=1))
    return 0.0


def apart(net: Any, model: nn.Module, example: Any, batches: tuple[int, ...]) -> tuple[float, bool]:
    """Largest difference between the pieces and the eager model, exits included; whether all logits
    are the same.
    """
    runner = off.open(net, Plan.never_leave(net.topology))
    worst = 0.0
    exact = True
    for count in batches:
        x = some(example, slice(0, count))
        with torch.no_grad():
            exits = net(x)
        for answers, logits in zip(runner.anytime(x), exits, strict=True):
            worst = max(worst, distance(logits, answers.logits))
        plain = eager(model, x)
        got = runner(x).logits
        worst = max(worst, distance(plain, got))
        exact = exact and bool(torch.equal(plain, got))
    return worst, exact


def dropped(net: Any, example: Any) -> tuple[float, list[int]]:
    """The same where about half of the rows leave at each gate; and how many left at each exit."""
    with torch.no_grad():
        walked = list(net.walk(example))
    stay = np.ones(len(walked[0][1]), bool)
    thresholds = dict[str, tuple[float]]()
    for name, _, score in walked[:-1]:
        values = np.sort(score.numpy()[stay])
        middle = len(values) // 2
        thresholds[name] = (
            (float(values[middle - 1] / 2 + values[middle] / 2),)
            if len(values) > 1
            else (float("inf"),)
        )
        stay &= score.numpy() < thresholds[name][0]
    answers = off.run(net, Plan.by_hand(thresholds), example)
    expected = torch.stack([logits for _, logits, _ in walked])[
        answers.exit, torch.arange(len(answers.exit))
    ]
    return distance(expected, answers.logits), np.bincount(
        answers.exit, minlength=len(walked)
    ).tolist()


def without_gradient(net: Any, model: nn.Module, example: Any) -> list[str]:
    """Parameters that get a gradient from the plain model's logits and none from the network's;
    exits' included.
    """
    logits = logits_in(model(**example) if isinstance(example, dict) else model(example))
    logits.square().sum().backward()
    meant = {
        f"backbone.{name}" for name, value in model.named_parameters() if value.grad is not None
    }
    model.zero_grad()
    sum(logits.square().sum() for logits in net(example)).backward()
    meant |= {name for name, _ in net.named_parameters() if name.startswith("exits.")}
    return sorted(
        meant - {name for name, value in net.named_parameters() if value.grad is not None}
    )


def free_length(model: nn.Module, example: dict[str, Tensor], cuts: Any) -> str:
    """Whether the model, cut at the same places, takes text of other lengths: "yes", or why not."""
    count = 0
    try:
        net = off.cut(model, example, at=list(cuts), exits="linear", length=list(example))
        for count in OTHERS:
            x = {name: torch.cat([value, value], 1)[:, :count] for name, value in example.items()}
            worst, left = dropped(net, x)
            if not worst <= BAND:
                return f"{worst:.0e} apart at length {count}, {left} leaving"
    except OfframpError as problem:
        return str(problem)
    except (
        RuntimeError,
        ValueError,
    ) as problem:  # of the eager model, or of an exit on features [B, F, T]
        return f"at length {count}: {problem}"
    return "yes"
