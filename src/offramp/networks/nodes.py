"""What stands at a node: the contracts of exits and gates, what they may look at, and asking them
with a check.

Shapes: B samples, C classes.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from offramp.errors import BadNetwork
from offramp.networks.taps import tensors_of
from offramp.plans.scores import ScoreRange


@dataclass(frozen=True)
class Seen:
    """What an exit or a gate may look at, for the rows that are still here.

    features: the tapped value at this node, [B, ...]. own: the logits of this node's exit, [B, C]
    (for itself None). Those named in `reads`: logits of earlier exits, [B, C] each (an exit sees
    what they hand on where that is something else, see `Hands`), and inputs such as
    `x/attention_mask`, [B, ...].
    """

    features: Tensor
    logits: Mapping[str, Tensor]
    own: Tensor | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)


class Exit(nn.Module, abc.ABC):
    """Contract of a classifier after a segment. `reads` names earlier exits whose logits it needs,
    and inputs.
    """

    reads: tuple[str, ...] = ()

    @abc.abstractmethod
    def forward(self, seen: Seen) -> Tensor:
        """Logits [B, C]; the answer for a row may not depend on its batch-mates."""

    @abc.abstractmethod
    def config(self) -> dict[str, Any]:
        """Plain data from which the shelf builds it again: {"name": ..., other arguments}."""

    def belong_to(self, model: nn.Module) -> None:
        """Called when a network is made of this exit: one that is a part of the user's model finds
        itself there.

        By default the exits within this one are called.

        Args:
            model: the user's model that is cut at this exit's node.
        """
        for child in self.children():
            if isinstance(child, Exit):
                child.belong_to(model)


@runtime_checkable
class Hands(Protocol):
    """An exit that hands to later exits something else than its answer: an ensemble's members, not
    its mean.
    """

    def both(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Its logits [B, C] (those of `forward`), and what later exits that read it see instead,
        [B, ...].
        """


class Gate(nn.Module, abc.ABC):
    """Contract of a score per sample: higher = readier to leave. `reads` names earlier exits and
    inputs.

    `spreads_nan`: whether a score is NaN by itself where a logit of this node's exit is NaN or
    infinite.
    """

    reads: tuple[str, ...] = ()
    spreads_nan: bool = False

    @abc.abstractmethod
    def score(self, seen: Seen) -> Tensor:
        """Scores [B], or [B, K - 1] at a node with K > 2 successors, the shallow choice first.

        The score of a row may depend neither on its batch-mates nor on the clock.
        """

    @abc.abstractmethod
    def config(self) -> dict[str, Any]:
        """Plain data from which the shelf builds it again: {"name": ..., other arguments}."""

    def score_range(self) -> ScoreRange:
        """The ends of the scores' range and where they saturate; by default nothing is known (the
        real line).

        A trace carries it, and calibration puts no threshold beside a value that many rows share.
        """
        return ScoreRange()


class Scorer(Gate):
    """A gate made of a function from logits [B, C] to scores [B], such as those in
    gates/confidence.py.

    A function may declare its range in an attribute `score_range` (see
    `offramp.plans.scores.scores_in`).
    """

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name = name
        self.function = function
        self.spreads_nan = getattr(function, "spreads_nan", False) is True

    def score(self, seen: Seen) -> Tensor:
        """The function of this exit's own logits."""
        assert seen.own is not None
        return self.function(seen.own)

    def config(self) -> dict[str, Any]:
        """The function's name on the shelf, or the user's module:name."""
        return {"name": self.name}

    def score_range(self) -> ScoreRange:
        """What the function declares; the real line if it declares nothing."""
        declared = getattr(self.function, "score_range", None)
        if declared is None:
            return ScoreRange()
        if not isinstance(declared, ScoreRange):
            raise BadNetwork(
                f"score_range of the gate {self.name!r} must be an "
                f"offramp.plans.scores.ScoreRange, got {declared!r}"
            )
        return declared

    def extra_repr(self) -> str:
        """For print."""
        return self.name


def answer(exit_: Exit, seen: Seen, name: str) -> Tensor:
    """Logits [B, C] of an exit, checked. Raises BadNetwork when it gives anything else."""
    return answers(exit_, seen, name)[0]


def answers(exit_: Exit, seen: Seen, name: str) -> tuple[Tensor, Tensor]:
    """Logits [B, C] of an exit, checked as `answer` does, and what it hands on: the same, unless it
    `Hands`.
    """
    logits, handed = exit_.both(seen) if isinstance(exit_, Hands) else (exit_(seen), None)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        way = (
            "Wrap the model so that it returns its logits alone, or in a dict under the key "
            "'logits'."
        )
        if isinstance(logits, (list, tuple)):
            way += (
                " If these are its own exits, docs/how-to/my-network-already-has-exits.md "
                "shows how to keep them."
            )
        raise BadNetwork(
            f"exit {name!r} must give logits [B, C] of at least two classes, got "
            f"{_described(logits)}. {way}"
        )
    return logits, logits if handed is None else handed


def _described(output: object) -> str:
    """What a model gave, with the name and shape of each tensor."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {list(output.shape)}"
    shapes = [
        f"{name.removeprefix('y/')} {list(tensor.shape)}"
        for name, tensor in tensors_of(output, "y").items()
    ]
    kind = type(output).__name__
    if shapes:
        return f"a {kind} of {', '.join(shapes)}"
    return f"a {kind} without a tensor"


def grade(gate: Gate, seen: Seen, own: Tensor | None, routes: int = 1) -> Tensor:
    """Scores of a gate, float32; NaN, so that the row goes on, where a logit of its own exit is not
    finite.

    Args:
        gate: of a node with routes + 1 successors.
        seen: what it may look at.
        own: logits [B, C] of the exit at this node; None where there is none.
        routes: how many scores a row gets.

    Returns:
        [B] with one route, otherwise [B, routes].

    Raises:
        BadNetwork: the gate gives another shape.
    """
    score = gate.score(Seen(seen.features, seen.logits, own, seen.inputs)).float()
    count = (seen.features if own is None else own).shape[0]
    if score.shape != ((count,) if routes == 1 else (count, routes)):
        expected = f"[{count}], one per row" if routes == 1 else f"[{count}, {routes}]"
        raise BadNetwork(f"a gate gave scores of shape {tuple(score.shape)}, expected {expected}")
    if own is None or gate.spreads_nan:
        return score
    # NaN where a logit is none; few operations, for batches of one
    finite = (own * 0).sum(-1).float()
    return score + (finite if routes == 1 else finite[:, None])


class Chooser(Gate):
    """A gate that rates every way from its node, and sends a row to the best one (the first of
    equals).

    Recipes train the ratings; thresholds of 0 take the best way, and a shift of all of them makes
    the first ways readier or less ready.
    """

    @abc.abstractmethod
    def ratings(self, seen: Seen) -> Tensor:
        """How good each way is for each row, [B, K] for K successors."""

    def score(self, seen: Seen) -> Tensor:
        """By how much each way but the last is better than all ways after it: [B], or [B, K -
        1].
        """
        return margins_of(self.ratings(seen))


def margins_of(ratings: Tensor) -> Tensor:
    """Ratings [B, K] -> scores [B, K - 1] ([B] for K = 2): the first score that reaches 0 is that
    of the best way.

    >>> margins_of(torch.tensor([[1.0, 3.0, 2.0]]))
    tensor([[-2.,  1.]])
    """
    scores = list[Tensor]()
    for way in range(ratings.shape[1] - 1):
        best_behind = ratings[:, way + 1 :].amax(1)  # [B]
        scores.append(ratings[:, way] - best_behind)
    return scores[0] if len(scores) == 1 else torch.stack(scores, 1)
