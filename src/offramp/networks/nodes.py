"""The contracts of exits and gates, and the checked calls of them.

Shapes: B samples, C classes.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from offramp.errors import BadNetwork
from offramp.networks.taps import tensors_of
from offramp.plans.scores import ScoreRange


@dataclass(frozen=True)
class Seen:
    """The tensors that an exit or a gate may read, for the rows that have not left.

    Attributes:
        features: the tapped value at this node, [B, ...].
        logits: of the earlier exits named in `reads`, [B, C] each. An exit sees what they hand on,
            if that is something else (see `Hands`).
        own: the logits of this node's exit, [B, C]; None for the exit itself.
        inputs: those named in `reads`, such as `x/attention_mask`, [B, ...] each.
    """

    features: Tensor
    logits: Mapping[str, Tensor]
    own: Tensor | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)


class Exit(nn.Module, abc.ABC):
    """Contract of a classifier after a segment.

    Attributes:
        reads: names of earlier exits whose logits it needs, and of inputs.
    """

    reads: tuple[str, ...] = ()

    @abc.abstractmethod
    def forward(self, seen: Seen) -> Tensor:
        """Logits [B, C]. The logits of a row must not depend on the other rows in the batch."""

    @abc.abstractmethod
    def config(self) -> dict[str, Any]:
        """Plain data to build it again from: {"name": ..., other arguments}."""

    def belong_to(self, model: nn.Module) -> None:
        """Called when a network is made with this exit.

        An exit that is a part of the user's model finds that part here. By default the call is
        passed to the exits inside this one.

        Args:
            model: the user's model that is cut at this exit's node.
        """
        for child in self.children():
            if isinstance(child, Exit):
                child.belong_to(model)


@runtime_checkable
class Hands(Protocol):
    """An exit that hands something else than its logits to later exits.

    For example, an ensemble answers with the mean of its members, and hands on the members.
    """

    def both(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Its logits [B, C], as from `forward`, and the tensor [B, ...] for later exits."""


class Gate(nn.Module, abc.ABC):
    """Contract of a score per sample. A sample with a higher score is readier to leave.

    Attributes:
        reads: names of earlier exits and of inputs that it needs.
        spreads_nan: whether its score is always NaN where a logit of this node's exit is NaN or
            infinite. Otherwise `grade` makes it so.
    """

    reads: tuple[str, ...] = ()
    spreads_nan: bool = False

    @abc.abstractmethod
    def score(self, seen: Seen) -> Tensor:
        """Scores [B], or [B, K - 1] at a node with K > 2 successors, the shallow choice first.

        The score of a row must not depend on the other rows in the batch, nor on the time.
        """

    @abc.abstractmethod
    def config(self) -> dict[str, Any]:
        """Plain data to build it again from: {"name": ..., other arguments}."""

    def score_range(self) -> ScoreRange:
        """The limits of the scores, and the values at which they saturate.

        By default nothing is known, and the range is the real line. A trace keeps it, and
        calibration puts no threshold next to a value that many rows share.
        """
        return ScoreRange()


class Scorer(Gate):
    """A gate made of a function, such as those in gates/confidence.py.

    Args:
        name: of the function, or the user's module:name.
        function: from logits [B, C] to scores [B]. It may declare its range in an attribute
            `score_range` (see `offramp.plans.scores.scores_in`).
    """

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name = name
        self.function = function
        self.spreads_nan = getattr(function, "spreads_nan", False) is True

    def score(self, seen: Seen) -> Tensor:
        """The function of this exit's own logits."""
        assert seen.own is not None  # a scorer is only hung where there is an exit
        return self.function(seen.own)

    def config(self) -> dict[str, Any]:
        """The name of the function, or the user's module:name."""
        return {"name": self.name}

    def score_range(self) -> ScoreRange:
        """The range that the function declares; the real line without. Raises BadNetwork."""
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
    """Call an exit and check its logits.

    Args:
        exit_: to call.
        seen: the tensors that it may read.
        name: of its node, for the message.

    Returns:
        Logits [B, C].

    Raises:
        BadNetwork: its output is something else.
    """
    logits, _ = answers(exit_, seen, name)
    return logits


def answers(
    exit_: Exit, seen: Seen, name: str, *, hands: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Call an exit as `answer` does, also for the tensor that it hands to later exits.

    Args:
        exit_: to call.
        seen: the tensors that it may read.
        name: of its node, for the message.
        hands: whether the exit `Hands`; None to find out. That takes ten microseconds, for which
            every batch would wait.

    Returns:
        Logits [B, C], and the handed tensor. They are the same, unless the exit `Hands`.
    """
    handed: Tensor | None = None
    if hands is None:
        hands = isinstance(exit_, Hands)
    if hands:
        logits, handed = cast("Hands", exit_).both(seen)
    else:
        logits = exit_(seen)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        way = (
            "Wrap the model so that it returns its logits alone, or in a dict under the key "
            "'logits'."
        )
        # A list of tensors suggests a network that already has exits.
        if isinstance(logits, (list, tuple)):
            way += (
                " If these are its own exits, docs/how-to/my-network-already-has-exits.md "
                "shows how to keep them."
            )
        raise BadNetwork(
            f"exit {name!r} must give logits [B, C] of at least two classes, got "
            f"{_described(logits)}. {way}"
        )
    if handed is None:
        return logits, logits
    return logits, handed


def _described(output: object) -> str:
    """The output of a model in words, with the name and shape of each tensor."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {list(output.shape)}"
    shapes = list[str]()
    for name, tensor in tensors_of(output, "y").items():
        shapes.append(f"{name.removeprefix('y/')} {list(tensor.shape)}")
    kind = type(output).__name__
    if shapes:
        return f"a {kind} of {', '.join(shapes)}"
    return f"a {kind} without a tensor"


def grade(gate: Gate, seen: Seen, own: Tensor | None, routes: int = 1) -> Tensor:
    """Call a gate and check its scores.

    A score is NaN if a logit of the node's own exit is not finite, so that the row goes on.

    Args:
        gate: of a node with routes + 1 successors.
        seen: the tensors that it may read.
        own: logits [B, C] of the exit at this node; None without an exit.
        routes: number of scores per row.

    Returns:
        float32 [B] with one route, otherwise [B, routes].

    Raises:
        BadNetwork: the gate gives another shape.
    """
    score = gate.score(Seen(seen.features, seen.logits, own, seen.inputs))
    count = (seen.features if own is None else own).shape[0]
    # [B] for one route, [B, routes] for several.
    shape = (count,) if routes == 1 else (count, routes)
    if not isinstance(score, Tensor) or score.shape != shape:
        expected = f"[{count}], one per row" if routes == 1 else f"[{count}, {routes}]"
        raise BadNetwork(f"a gate must give scores {expected}, got {_scores_in_words(score)}")
    score = score.float()
    if own is None or gate.spreads_nan:
        return score
    # 0 where all logits are finite, otherwise NaN. Two operations, to be fast for a batch of one.
    finite = (own * 0).sum(-1).float()
    return score + (finite if routes == 1 else finite[:, None])


def _scores_in_words(score: object) -> str:
    """What a gate gave instead of scores."""
    if isinstance(score, Tensor):
        return f"a tensor of shape {list(score.shape)}"
    if score is None:
        return "None"
    article = "an" if type(score).__name__[0] in "aeiou" else "a"
    return f"{article} {type(score).__name__}"


class Chooser(Gate):
    """A gate that rates every successor of its node, and sends a row to the best one.

    Recipes train the ratings. Thresholds of 0 choose the successor with the best rating, the first
    one among equals. Lower thresholds favour the first successors, higher ones the last.
    """

    @abc.abstractmethod
    def ratings(self, seen: Seen) -> Tensor:
        """How good each successor is for each row, [B, K]."""

    def score(self, seen: Seen) -> Tensor:
        """By how much each successor is better than all later ones: [B], or [B, K - 1]."""
        return margins_of(self.ratings(seen))


def margins_of(ratings: Tensor) -> Tensor:
    """Turn ratings into scores, of which the first that reaches 0 belongs to the best rating.

    Args:
        ratings: [B, K].

    Returns:
        [B, K - 1]; for K = 2 it is [B].

    >>> margins_of(torch.tensor([[1.0, 3.0, 2.0]]))
    tensor([[-2.,  1.]])
    """
    scores = list[Tensor]()
    for way in range(ratings.shape[1] - 1):
        best_later = ratings[:, way + 1 :].amax(1)  # [B, K - way - 1] -> [B]
        scores.append(ratings[:, way] - best_later)
    if len(scores) == 1:
        return scores[0]
    return torch.stack(scores, 1)  # [B, K - 1]
