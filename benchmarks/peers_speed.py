"""Timings of peers.py: offramp, earlyon, a whole-batch exit and the plain network; same weights,
rows, thresholds.

Shapes: B rows, E exits. Scores are the largest probability everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peers_earlyon import SETTINGS, as_exit, earlyon, fractions_of, wrapped
from torch import Tensor, nn

import offramp as off
from offramp.gates.confidence import max_prob
from offramp.layers.preprocess import Preprocess

# Internal: times taken in turn, as in our own figures.
from offramp.runtime.measuring import interleaved, ratio


@dataclass(frozen=True)
class Contest:
    """One model with its exits, as every side takes it. stages: the plain model in E pieces, called
    one by one.
    """

    network: off.Network
    wrapper: Any
    stages: Sequence[Callable[[Tensor], Tensor]]
    heads: Sequence[nn.Module]
    plain: Callable[[Tensor], Tensor]


def whole_batch(contest: Contest, thresholds: Sequence[float], x: Tensor) -> Tensor:
    """Logits [B, C] of an exit for whole batches: they go on to the end as long as one row is not
    sure.
    """
    with torch.inference_mode():
        h = x
        for stage, head, threshold in zip(
            contest.stages[:-1], contest.heads, thresholds, strict=True
        ):
            h = stage(h)
            if threshold > 1:  # a closed exit
                continue
            logits: Tensor = head(h)
            if bool((logits.softmax(-1).amax(-1) >= threshold).all()):
                return logits
        return contest.stages[-1](h)


def contest(
    model: nn.Module,
    preprocess: nn.Module,
    at: Sequence[str],
    heads: Sequence[nn.Module],
    x: Tensor,
    first: str,
) -> Contest:
    """The same modules for all sides. first: the module of the first cut's own kind, which says the
    model's family.
    """
    exits = {name: as_exit(head) for name, head in zip(at, heads, strict=True)}
    network = off.cut(
        model, x[:2], at=at, exits=exits, gate="max_prob", preprocess=preprocess
    ).eval()
    both = nn.Sequential(preprocess, model)
    wrapper = wrapped(
        both, [f"1.{name}" for name in at], heads, SETTINGS["confidence"], tuple(x.shape[1:])
    )
    fractions_of(wrapper, at)  # estimated on first use: outside the clock
    return Contest(network, wrapper, _stages(model, preprocess, first), heads, both)


def _stages(model: Any, preprocess: nn.Module, first: str) -> list[Callable[[Tensor], Tensor]]:
    if first == "cifar":
        return [
            nn.Sequential(preprocess, model.conv1, model.bn1, nn.ReLU(), model.layer1),
            model.layer2,
            lambda h: model.linear(model.layer3(h).mean((2, 3))),
        ]
    stem = nn.Sequential(
        preprocess, model.conv1, model.bn1, model.relu, model.maxpool, model.layer1
    )
    last = nn.Sequential(model.layer4, model.avgpool, nn.Flatten(), model.fc)
    return [stem, model.layer2, model.layer3, last]


def quick_start(rows: np.ndarray, pixels: int) -> tuple[Contest, Tensor]:
    """The model of earlyon's README, `resnet50_ee`, with seeded weights, and CIFAR-10's rows
    enlarged to uint8.
    """
    torch.manual_seed(0)
    made = earlyon("models").resnet50_ee(num_classes=10, pretrained=False).eval()
    x = torch.as_tensor(rows).repeat_interleave(pixels // 32, 2).repeat_interleave(pixels // 32, 3)
    preprocess = Preprocess(
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), expects=(pixels, pixels)
    )
    heads = list(made.exit_heads.values())
    return contest(
        made.backbone, preprocess, ("layer1", "layer2", "layer3"), heads, x, "torchvision"
    ), x


def scores_of(network: off.Network, x: Tensor) -> np.ndarray:
    """Largest probabilities [B, E-1]."""
    with torch.inference_mode():
        found = [
            [max_prob(logits).numpy() for logits in network(part)[:-1]] for part in x.split(64)
        ]
    return np.stack([np.concatenate(column) for column in zip(*found, strict=True)], 1)


def easy_and_hard(scores: np.ndarray, easy: int, hard: int) -> tuple[np.ndarray, list[float]]:
    """Rows of which `easy` leave at the first exit and `hard` nowhere, in an order drawn once; and
    the thresholds.
    """
    order = np.argsort(-scores[:, 0], kind="stable")
    sure = order[:easy]
    late = order[len(order) // 2 :]
    tired = late[np.argsort(scores[late, 1:].max(1), kind="stable")[:hard]]
    above = [float(scores[tired, k].max(initial=0.0)) for k in range(scores.shape[1])]
    first = float((scores[sure, 0].min(initial=1.0) + above[0]) / 2) if easy else 1.0
    return np.random.default_rng(0).permutation(np.concatenate([sure, tired])), [
        first,
        *_over(above[1:]),
    ]


def _over(values: Sequence[float]) -> list[float]:
    return [min(1.0, (value + 1) / 2) for value in values]


def set_thresholds(contest: Contest, thresholds: Sequence[float]) -> off.Plan:
    """The same thresholds on all sides; +inf closes an exit."""
    config = contest.wrapper.config
    config.enabled_exits = [value <= 1 for value in thresholds]
    config.confidence_thresholds = [min(value, 1.0) for value in thresholds]
    return off.Plan.by_hand(
        dict(zip(contest.network.topology.gates, map(float, thresholds), strict=True))
    )


def timed(contest: Contest, x: Tensor, thresholds: Sequence[float], repeats: int) -> dict[str, Any]:
    """One line: medians, where the rows leave, and ratios of interleaved medians."""
    plan = set_thresholds(contest, thresholds)
    model = contest.wrapper
    runner = off.open(contest.network, plan)
    many = len(x) > 1

    def plain() -> object:
        with torch.inference_mode():
            return contest.plain(x)

    def one_by_one() -> list[Any]:
        return [model(row, mode="inference") for row in x.split(1)]

    calls: Mapping[str, Callable[[], object]] = {
        "plain": plain,
        "offramp": lambda: runner(x),
        "earlyon": (lambda: model.forward_inference_batched(x))
        if many
        else (lambda: model(x, mode="inference")),
        "whole batch": lambda: whole_batch(contest, thresholds, x),
        "plain again": plain,
        **({"earlyon, row by row": one_by_one} if many else {}),
    }
    times = interleaved(calls, repeats=repeats, warmup=2)
    answers = runner(x)
    rows = one_by_one()
    last = len(contest.network.topology.exits) - 1
    same = sum(
        int(a == (last if b.exit_taken < 0 else b.exit_taken))
        for a, b in zip(answers.exit, rows, strict=True)
    )
    over = [("offramp", name) for name in calls if name not in ("offramp", "plain again")]
    return {
        "batch": len(x),
        "left": torch.bincount(answers.exit, minlength=last + 1).tolist(),
        "same_exit_as_earlyon_row_by_row": same,
        "ms": {name: float(np.median(values)) for name, values in times.items()},
        **{f"{a} / {b}": vars(ratio(times[a], times[b])) for a, b in [*over, ("earlyon", "plain")]},
        "plain / plain": vars(ratio(times["plain again"], times["plain"])),
    }


def lines(
    contest: Contest, x: Tensor, plans: Mapping[str, Sequence[float]], repeats: int
) -> dict[str, Any]:
    """Batch 64 with 63 and 64 easy rows, batch 1 easy and hard, and rows as they come under given
    thresholds.
    """
    scores = scores_of(contest.network, x[:512])
    found = {}
    for name, easy, hard in (
        ("63 easy, 1 hard", 63, 1),
        ("64 easy", 64, 0),
        ("1 easy", 1, 0),
        ("1 hard", 0, 1),
    ):
        rows, thresholds = easy_and_hard(scores, easy, hard)
        found[name] = timed(contest, x[rows], thresholds, repeats if len(rows) > 1 else 3 * repeats)
        print(name, found[name], flush=True)
    for name, thresholds in plans.items():
        found[f"{name}, 64 as they come"] = timed(contest, x[:64], thresholds, repeats)
    return found
