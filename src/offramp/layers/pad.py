"""PAD: a dynamic layer of which only some weights are dynamic (He et al., 2023, arXiv 2211.05528).

A dynamic convolution mixes K kernels per sample, W(x) = sum_k pi_k(x) W_k, with attention pi =
softmax( fc2(relu(fc1(mean of x over positions))) / T). Here a mask M says which weights are
dynamic; the others are shared by all samples:

    W(x) = phi M sum_k pi_k(x) W_k  +  (2 - phi) (1 - M) W_static
    phi  = 2 sigmoid(p), where p starts at 0

For a linear layer the second case of the paper, a mixture of experts: each position goes to the
expert that its router likes best, y = g_e W_e x with W_e = M W_dyn^e + (1 - M) W_static.

Only dynamic weights are stored K times, as rows of a [K, n] matrix beside the mask as bits, and
only they are mixed: K n multiply-adds a sample instead of K N. The convolution itself costs what a
dense one does, and runs as a product with unfolded inputs, sample by sample. Experts are all
computed, for torch has no kernel that picks one per position: the cost says so.

Which weights are dynamic is chosen by `partitioned` (iterative mode partition).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, unfold

from offramp._support.arguments import require
from offramp.errors import BadNetwork, InvalidArgument
from offramp.layers._replacing import copied, placed_like, require_convolution, require_whole
from offramp.layers.packed import packed_bits, unpacked_bits
from offramp.layers.ternary import moves_of, require_zeros
from offramp.networks.inputs import as_inputs, call_model
from offramp.networks.layer import Layer, LayerCost, dense_cost, stored_bytes
from offramp.networks.taps import logits_in

__all__ = ["Pad", "partitioned"]

SCORES = ("sensitivity", "variance", "magnitude", "random")
SCOPES = ("model", "layer")


class Pad(Layer):
    """A partially dynamic convolution [B, C, H, W], or linear layer [B, ..., F].

    Args:
        weight: of the dense layer, [O, C, k, k] or [O, F].
        bias: of the dense layer, or None.
        mask: bool, of the shape of `weight`: which weights are dynamic.
        kernels: K, kernels or experts.
        hidden: width of the attention's inner layer; experts have none.
        temperature: T.
        moves: how the convolution moves; empty for a linear layer.
    """

    kinds = (nn.Conv2d, nn.Linear)
    bits: Tensor
    place: Tensor
    rest: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor,
        *,
        kernels: int,
        hidden: int,
        temperature: float,
        moves: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.shape = tuple(weight.shape)
        self.kernels = kernels
        self.temperature = temperature
        self.moves = dict(moves)
        flat = weight.detach().flatten()
        chosen = mask.flatten()
        self.dynamic = nn.Parameter(flat[chosen].repeat(kernels, 1))  # [K, n]
        self.static = nn.Parameter(flat[~chosen].clone())  # [N - n]
        self.bias = copied(bias)
        self.balance = nn.Parameter(torch.zeros(()))  # p
        inputs = self.shape[1]
        if self.moves:
            self.attention: nn.Module = nn.Sequential(
                nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, kernels)
            )
        else:
            self.attention = nn.Linear(inputs, kernels)
        self.hidden = hidden
        self.register_buffer("bits", packed_bits(chosen.to(torch.uint8).cpu(), 1))
        self.register_buffer("place", torch.zeros(self.dynamic.shape[1]).long(), persistent=False)
        self.register_buffer("rest", torch.zeros(len(self.static)).long(), persistent=False)
        self._find_places()

    @classmethod
    def from_layer(
        cls,
        dense: nn.Module,
        *,
        ratio: float = 0.5,
        kernels: int = 4,
        reduction: int = 16,
        temperature: float = 1.0,
    ) -> Pad:
        """The layer in which the largest weights are dynamic; it starts by giving what it gave.

        Args:
            dense: a Conv2d without groups that pads with zeros, or a Linear layer.
            ratio: kappa, the share of weights that are dynamic: 1 is a dynamic layer, 0 a static
                one.
            kernels: K.
            reduction: the attention's inner layer has a width of the channels divided by this.
            temperature: T; high ones mix evenly. The authors let it fall from 30.

        Raises:
            BadNetwork: another kind of layer, or a grouped convolution.
            InvalidArgument: an option out of its range.
        """
        if isinstance(dense, nn.Conv2d) and require_convolution(dense, "pad").groups > 1:
            raise BadNetwork(f"pad cannot replace a grouped convolution, got groups={dense.groups}")
        layer = require_zeros(dense, "pad")
        if not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
            raise InvalidArgument(f"ratio must be a share from 0 to 1, got {ratio!r}")
        require_whole("kernels", kernels, 1)
        require_whole("reduction", reduction, 1)
        require("temperature", temperature, above=0)
        weight = layer.weight.detach()
        mask = largest(weight.abs(), round(ratio * weight.numel()))
        made = cls(
            weight,
            layer.bias,
            mask,
            kernels=kernels,
            hidden=max(1, weight.shape[1] // reduction),
            temperature=temperature,
            moves=moves_of(layer),
        )
        return placed_like(made, dense)

    def options(self) -> dict[str, Any]:
        """Share, kernels, width and temperature. Which weights are dynamic is in the file of
        weights.
        """
        count = self.dynamic.shape[1]
        total = count + len(self.static)
        return {
            "ratio": count / total,
            "kernels": self.kernels,
            "reduction": max(1, self.shape[1] // self.hidden),
            "temperature": self.temperature,
        }

    def mask(self) -> Tensor:
        """Which weights are dynamic: bool, of the shape of the dense weights."""
        count = torch.Size(self.shape).numel()
        found = unpacked_bits(self.bits.cpu(), 1, count).bool()
        return found.view(self.shape).to(self.bits.device)

    def _find_places(self) -> None:
        mask = self.mask().flatten()
        self.place.copy_(mask.nonzero()[:, 0])
        self.rest.copy_((~mask).nonzero()[:, 0])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, *rest)
        self._find_places()

    def phi(self) -> Tensor:
        """The weight of the dynamic part, 0 to 2; that of the static one is 2 - phi."""
        return 2 * torch.sigmoid(self.balance)

    def attend(self, x: Tensor) -> Tensor:
        """pi(x): per sample [B, K] of images, per position [B, ..., K] of a linear layer."""
        given = x.mean((2, 3)) if self.moves else x
        return torch.softmax(self.attention(given) / self.temperature, -1)

    def base(self) -> Tensor:
        """The static part of the weights, zero where they are dynamic: flat [N]."""
        count = torch.Size(self.shape).numel()
        empty = self.static.new_zeros(count)
        return empty.index_copy(0, self.rest, (2 - self.phi()) * self.static)

    def weights(self, x: Tensor) -> Tensor:
        """W(x) of each sample: [B, N]."""
        mixed = self.phi() * (self.attend(x) @ self.dynamic)  # [B, n]
        base = self.base().expand(x.shape[0], -1)
        return base.index_copy(1, self.place, mixed)

    def sparsity(self) -> float:
        """The share of weights that are static."""
        return 1 - self.dynamic.shape[1] / torch.Size(self.shape).numel()

    def cost(self, shape: Sequence[int]) -> LayerCost:
        """What is computed, attention and mixing among it; the mask takes a bit a weight."""
        counted = dense_cost(self, shape)
        return LayerCost(counted.macs, counted.bit_operations, stored_bytes(self))

    def forward(self, x: Tensor) -> Tensor:
        """The shapes of the layer that it replaces."""
        if self.moves:
            return self.convolved(x, self.weights(x))
        return self._routed(x)

    def convolved(self, x: Tensor, weights: Tensor) -> Tensor:
        """Each sample [C, H, W] by its own kernel [N]: the product with unfolded inputs."""
        outputs = self.shape[0]
        kernel = self.shape[2:]
        moves = self.moves
        # [B, C k k, L]
        columns = unfold(x, kernel, moves["dilation"], moves["padding"], moves["stride"])
        product = weights.view(x.shape[0], outputs, -1) @ columns  # [B, O, L]
        if self.bias is not None:
            product = product + self.bias[:, None]
        high = _length(x.shape[2], kernel[0], moves, 0)
        return product.reshape(x.shape[0], outputs, high, -1)

    def _routed(self, x: Tensor) -> Tensor:
        """Each position by the expert that its router likes best, weighted by K g_e / (K sum): top
        1.
        """
        count = torch.Size(self.shape).numel()
        likes = self.attend(x)  # [..., K]
        best = likes.max(-1, keepdim=True).values
        chosen = (likes == best).to(x.dtype)
        chosen = chosen / chosen.sum(-1, keepdim=True)
        # The value is 1 for the chosen expert; the gradient is that of its weight g.
        gate = chosen * (1 + best - best.detach())
        out = linear(x, self.base().view(self.shape), self.bias)
        for expert in range(self.kernels):
            values = self.phi() * self.dynamic[expert]
            weight = values.new_zeros(count).index_copy(0, self.place, values).view(self.shape)
            out = out + gate[..., expert : expert + 1] * linear(x, weight)
        return out


def _length(size: int, kernel: int, moves: Mapping[str, Any], axis: int) -> int:
    """What a convolution leaves of a side of an image."""
    reach = moves["dilation"][axis] * (kernel - 1) + 1
    return int((size + 2 * moves["padding"][axis] - reach) // moves["stride"][axis] + 1)


def largest(score: Tensor, count: int) -> Tensor:
    """A mask of the `count` largest of some scores; of equal ones the first."""
    order = score.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    mask[order[:count]] = True
    return mask.view(score.shape)


def partitioned(
    model: nn.Module,
    x: Any,
    y: Any,
    *,
    ratio: float = 0.5,
    rounds: int = 1,
    score: str = "sensitivity",
    scope: str = "model",
    batch_size: int = 64,
    seed: int = 0,
) -> nn.Module:
    """A copy of a model in which fewer weights of its PAD layers are dynamic (iterative mode
    partition).

    In round t of T the share ratio^(t / T) of the weights stays dynamic, those of the largest
    scores:

        sensitivity   |dL / dM_i| summed over the rows, where M_i turns weight i from its static
                      value, the mean of its K dynamic ones, to the dynamic mix: what the loss
                      loses to first order
        variance      the variance of its K values
        magnitude     the mean absolute value of its K values
        random        none

    In the authors' code the static value is a tensor of its own, which no gradient has ever reached
    while all weights are dynamic; the mean of the kernels makes the same score useful after
    training.

    Args:
        model: with PAD layers, best fully dynamic and trained ("pad?ratio=1").
        x: rows as the model takes them.
        y: their labels [N].
        ratio: kappa, the share of all weights of the layers that is dynamic in the end.
        rounds: T.
        score: one of the four.
        scope: "model" compares scores among all layers, each normalised to a sum of 1; "layer"
            within each.
        batch_size: rows that are looked at together.
        seed: of random scores.

    Raises:
        BadNetwork: the model has no PAD layer.
        InvalidArgument: an argument out of its range, or a ratio above that of the model.
    """
    _require(ratio, rounds, score, scope)
    made = copy.deepcopy(model)
    names = [name for name, part in made.named_modules() if isinstance(part, Pad)]
    if not names:
        raise BadNetwork(
            "the model must have PAD layers to partition; convert some with 'pad?ratio=1'"
        )
    total = sum(torch.Size(_pad(made, name).shape).numel() for name in names)
    now = sum(_pad(made, name).dynamic.shape[1] for name in names) / total
    if ratio > now:
        raise InvalidArgument(
            f"ratio must be at most {now:.3g}, the share that is dynamic now, got {ratio:g}"
        )
    draw = torch.Generator().manual_seed(seed)
    labels = torch.as_tensor(y)
    for turn in range(1, rounds + 1):
        share = ratio ** (turn / rounds) if ratio else 0.0
        share = min(share, now)
        scores = _scores(made, names, x, labels, score, batch_size, draw)
        masks = _chosen(made, names, scores, share, total, scope)
        for name, mask in masks.items():
            parent, _, last = name.rpartition(".")
            setattr(made.get_submodule(parent), last, _reduced(_pad(made, name), mask))
    return made


def _require(ratio: float, rounds: int, score: str, scope: str) -> None:
    require("ratio", ratio, low=0, high=1)
    require_whole("rounds", rounds, 1)
    if score not in SCORES:
        raise InvalidArgument(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    if scope not in SCOPES:
        raise InvalidArgument(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")


def _pad(model: nn.Module, name: str) -> Pad:
    layer = model.get_submodule(name)
    assert isinstance(layer, Pad)
    return layer


def _scores(
    model: nn.Module,
    names: Sequence[str],
    x: Any,
    y: Tensor,
    score: str,
    size: int,
    draw: torch.Generator,
) -> dict[str, Tensor]:
    """A number for each dynamic weight of each layer, [n], with a sum of 1 in each layer."""
    found: dict[str, Tensor] = {}
    for name in names:
        values = _pad(model, name).dynamic.detach()
        if score == "variance":
            found[name] = values.var(0, unbiased=False)
        elif score == "magnitude":
            found[name] = values.abs().mean(0)
        else:
            found[name] = torch.rand(values.shape[1], generator=draw).to(values)
    if score == "sensitivity":
        found = _sensitivities(model, names, x, y, size)
    return {name: values / values.sum().clamp_min(1e-30) for name, values in found.items()}


def _sensitivities(
    model: nn.Module, names: Sequence[str], x: Any, y: Tensor, size: int
) -> dict[str, Tensor]:
    """|sum of dL/dM| over the rows.

    With M between the mean of the kernels and their mix, dL/dM = sum_k dL/dW_k (W_k - mean W), for
    dL/dW_k = dL/dW pi_k phi: so the gradients of the stored values are enough.
    """
    layers = {name: _pad(model, name) for name in names}
    totals = {name: torch.zeros_like(layer.dynamic[0]) for name, layer in layers.items()}
    state = as_inputs(x)
    for first in range(0, len(y), size):
        rows = {name: value[first : first + size] for name, value in state.items()}
        with torch.enable_grad():
            logits = logits_in(call_model(model, None, rows))
            loss = cross_entropy(logits, y[first : first + size], reduction="sum")
            values = [layer.dynamic.requires_grad_() for layer in layers.values()]
            grads = torch.autograd.grad(loss, values, allow_unused=True)
        for (name, layer), grad in zip(layers.items(), grads, strict=True):
            if grad is not None:
                away = layer.dynamic.detach() - layer.dynamic.detach().mean(0)
                totals[name] += (grad * away).sum(0)
    return {name: value.abs() for name, value in totals.items()}


def _chosen(
    model: nn.Module,
    names: Sequence[str],
    scores: Mapping[str, Tensor],
    share: float,
    total: int,
    scope: str,
) -> dict[str, Tensor]:
    """For each layer which of its dynamic weights stay so: bool [n]."""
    if scope == "layer":
        kept: dict[str, Tensor] = {}
        for name in names:
            count = round(share * torch.Size(_pad(model, name).shape).numel())
            kept[name] = largest(scores[name], min(count, len(scores[name])))
        return kept
    together = torch.cat([scores[name] for name in names])
    mask = largest(together, min(round(share * total), len(together)))
    sizes = [len(scores[name]) for name in names]
    return dict(zip(names, torch.split(mask, sizes), strict=True))


def _reduced(layer: Pad, stays: Tensor) -> Pad:
    """The layer in which some dynamic weights have become static, at the mean of their kernels."""
    flat = layer.base().detach() / (2 - layer.phi().detach())
    means = layer.dynamic.detach().mean(0) * layer.phi().detach() / (2 - layer.phi().detach())
    flat = flat.index_copy(0, layer.place, means)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[layer.place[stays]] = True
    made = Pad(
        flat.view(layer.shape),
        layer.bias,
        mask.view(layer.shape),
        kernels=layer.kernels,
        hidden=layer.hidden,
        temperature=layer.temperature,
        moves=layer.moves,
    )
    placed_like(made, layer)
    with torch.no_grad():
        made.dynamic.copy_(layer.dynamic[:, stays])
        made.balance.copy_(layer.balance)
    made.attention.load_state_dict(layer.attention.state_dict())
    return made
