"""PAD: a layer in which only some weights are dynamic (He et al., 2023, arXiv 2211.05528).

A dynamic convolution mixes K kernels per sample, W(x) = sum_k pi_k(x) W_k, with attention pi =
softmax( fc2(relu(fc1(mean of x over positions))) / T). In PAD a mask M selects the dynamic weights.
The others are shared by all samples:

    W(x) = phi M sum_k pi_k(x) W_k  +  (2 - phi) (1 - M) W_static
    phi  = 2 sigmoid(p), where p starts at 0

A linear layer is the second case of the paper, a mixture of experts: each position goes to the
expert with the largest gate g, y = g_e W_e x with W_e = M W_dyn^e + (1 - M) W_static.

Only the n dynamic weights of N are stored K times, as rows of a [K, n] matrix, and the mask is
stored as bits. Only these weights are mixed: K n multiply-adds a sample instead of K N. The
convolution itself costs as much as a dense one. It runs as a product with unfolded inputs, sample
by sample. All experts are computed, because torch has no kernel that picks one per position; the
cost counts them all.

`partitioned` chooses the dynamic weights (iterative mode partition).
"""

from __future__ import annotations

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
from offramp.networks.wrappers import deep_copy

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
        moves: stride, padding, dilation and groups of the convolution; empty for a linear layer.
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
        flat = weight.detach().flatten()  # [N]
        is_dynamic = mask.flatten()
        self.dynamic = nn.Parameter(flat[is_dynamic].repeat(kernels, 1))  # [K, n]
        self.static = nn.Parameter(flat[~is_dynamic].clone())  # [N - n]
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
        self.register_buffer("bits", packed_bits(is_dynamic.to(torch.uint8).cpu(), 1))
        # the positions of dynamic and of static weights in [N]; they follow from the bits
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
        """Replace a layer by one whose largest weights are dynamic. It starts with the same output.

        Args:
            dense: a Conv2d without groups that pads with zeros, or a Linear layer.
            ratio: kappa, the share of dynamic weights: 1 is a fully dynamic layer, 0 a static one.
            kernels: K.
            reduction: the attention's inner width is the number of input channels divided by this.
            temperature: T; high ones mix evenly. The authors let it fall from 30.

        Raises:
            BadNetwork: `dense` is another kind of layer, or a grouped convolution.
            InvalidArgument: an option is out of its range.
        """
        if isinstance(dense, nn.Conv2d) and require_convolution(dense, "pad").groups > 1:
            raise BadNetwork(f"pad cannot replace a grouped convolution, got groups={dense.groups}")
        layer = require_zeros(dense, "pad")
        require("ratio", ratio, low=0, high=1)
        require_whole("kernels", kernels, 1)
        require_whole("reduction", reduction, 1)
        require("temperature", temperature, above=0)
        weight = layer.weight.detach()
        mask = largest(weight.abs(), round(ratio * weight.numel()))
        pad = cls(
            weight,
            layer.bias,
            mask,
            kernels=kernels,
            hidden=max(1, weight.shape[1] // reduction),
            temperature=temperature,
            moves=moves_of(layer),
        )
        return placed_like(pad, dense)

    def options(self) -> dict[str, Any]:
        """Share, kernels, width and temperature. The mask is among the weights."""
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
        flat = unpacked_bits(self.bits.cpu(), 1, count).bool()  # [N]
        return flat.view(self.shape).to(self.bits.device)

    def _find_places(self) -> None:
        """Set the positions of dynamic and of static weights from the mask."""
        mask = self.mask().flatten()
        self.place.copy_(mask.nonzero()[:, 0])
        self.rest.copy_((~mask).nonzero()[:, 0])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, *rest)
        self._find_places()

    def phi(self) -> Tensor:
        """The factor of the dynamic part, 0 to 2. The factor of the static part is 2 - phi."""
        return 2 * torch.sigmoid(self.balance)

    def attend(self, x: Tensor) -> Tensor:
        """pi(x): per sample [B, K] of images, per position [B, ..., K] of a linear layer."""
        if self.moves:
            x = x.mean((2, 3))  # [B, C, H, W] -> [B, C]
        return torch.softmax(self.attention(x) / self.temperature, -1)

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
        """Everything that is computed, with attention and mixing. The mask is stored as a bit per
        weight.
        """
        counted = dense_cost(self, shape)
        return LayerCost(counted.macs, counted.bit_operations, stored_bytes(self))

    def forward(self, x: Tensor) -> Tensor:
        """The shapes of the replaced layer."""
        if self.moves:
            return self.convolved(x, self.weights(x))
        return self._routed(x)

    def convolved(self, x: Tensor, weights: Tensor) -> Tensor:
        """Convolve each sample [C, H, W] with its own kernel [N], by a product with unfolded
        inputs.
        """
        outputs = self.shape[0]
        kernel = self.shape[2:]
        moves = self.moves
        # [B, C, H, W] -> [B, C k k, L], a column for each of the L output positions
        columns = unfold(x, kernel, moves["dilation"], moves["padding"], moves["stride"])
        product = weights.view(x.shape[0], outputs, columns.shape[1]) @ columns  # [B, O, L]
        if self.bias is not None:
            product = product + self.bias[:, None]
        height = _length(x.shape[2], kernel[0], moves, 0)
        width = _length(x.shape[3], kernel[1], moves, 1)
        return product.reshape(x.shape[0], outputs, height, width)  # [B, O, H', W']

    def _routed(self, x: Tensor) -> Tensor:
        """Multiply each position with the expert of the largest gate (top 1): [B, ..., F] -> [B,
        ..., O].
        """
        count = torch.Size(self.shape).numel()
        gates = self.attend(x)  # [..., K]
        best = gates.max(-1, keepdim=True).values  # [..., 1]
        chosen = (gates == best).to(x.dtype)
        chosen = chosen / chosen.sum(-1, keepdim=True)  # equal gates share a position
        # The value is 1 for the chosen expert; the gradient is that of its gate g.
        gate = chosen * (1 + best - best.detach())
        out = linear(x, self.base().view(self.shape), self.bias)
        for expert in range(self.kernels):
            values = self.phi() * self.dynamic[expert]
            weight = values.new_zeros(count).index_copy(0, self.place, values).view(self.shape)
            out = out + gate[..., expert : expert + 1] * linear(x, weight)
        return out


def _length(size: int, kernel: int, moves: Mapping[str, Any], axis: int) -> int:
    """The length of one side of a convolution's output."""
    reach = moves["dilation"][axis] * (kernel - 1) + 1
    return int((size + 2 * moves["padding"][axis] - reach) // moves["stride"][axis] + 1)


def largest(score: Tensor, count: int) -> Tensor:
    """A mask of the `count` largest scores, of the same shape. Of equal scores the first counts."""
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
    """Copy a model, and make fewer weights of its PAD layers dynamic (iterative mode partition).

    In round t of T the share ratio^(t / T) of the weights stays dynamic, the ones with the largest
    scores:

        sensitivity   |dL / dM_i| summed over the rows. M_i moves weight i from its static value,
                      the mean of its K dynamic ones, to the dynamic mix. So this is the change of
                      the loss to first order.
        variance      the variance of its K values
        magnitude     the mean absolute value of its K values
        random        a random number

    In the authors' code the static value is a tensor of its own. No gradient reaches it while all
    weights are dynamic. With the mean of the kernels instead, the score is useful after training.

    Args:
        model: a model with PAD layers, best fully dynamic and trained ("pad?ratio=1").
        x: rows as the model takes them.
        y: their labels [N].
        ratio: kappa, the final share of dynamic weights in all PAD layers.
        rounds: T.
        score: one of the four.
        scope: "model" compares scores among all layers, each normalised to a sum of 1; "layer"
            compares them within each layer.
        batch_size: rows that are computed together.
        seed: of random scores.

    Returns:
        The copy.

    Raises:
        BadNetwork: the model has no PAD layer.
        InvalidArgument: an argument is out of its range, or the ratio is above that of the model.
    """
    _require(ratio, rounds, score, scope)
    copied = deep_copy(model)
    names = [name for name, module in copied.named_modules() if isinstance(module, Pad)]
    if not names:
        raise BadNetwork(
            "the model must have PAD layers, got none. Convert some with 'pad?ratio=1'"
        )
    total = 0
    dynamic = 0
    for name in names:
        layer = _pad(copied, name)
        total += torch.Size(layer.shape).numel()
        dynamic += layer.dynamic.shape[1]
    now = dynamic / total
    if ratio > now:
        raise InvalidArgument(
            f"ratio must be at most {now:.3g}, the share that is dynamic now, got {ratio:g}"
        )
    draw = torch.Generator().manual_seed(seed)
    labels = torch.as_tensor(y)
    for number in range(1, rounds + 1):
        # the share falls by the same factor in each round
        share = 0.0
        if ratio:
            share = min(ratio ** (number / rounds), now)
        scores = _scores(copied, names, x, labels, score, batch_size, draw)
        masks = _chosen(copied, names, scores, share, total, scope)
        for name, mask in masks.items():
            parent, _, last = name.rpartition(".")
            setattr(copied.get_submodule(parent), last, _reduced(_pad(copied, name), mask))
    return copied


def _require(ratio: float, rounds: int, score: str, scope: str) -> None:
    """Raise InvalidArgument for an argument out of its range."""
    require("ratio", ratio, low=0, high=1)
    require_whole("rounds", rounds, 1)
    if score not in SCORES:
        raise InvalidArgument(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    if scope not in SCOPES:
        raise InvalidArgument(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")


def _pad(model: nn.Module, name: str) -> Pad:
    """A PAD layer of a model."""
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
    """The score of each dynamic weight of each layer, [n], with a sum of 1 in each layer."""
    scores: dict[str, Tensor] = {}
    for name in names:
        values = _pad(model, name).dynamic.detach()  # [K, n]
        if score == "variance":
            scores[name] = values.var(0, unbiased=False)
        elif score == "magnitude":
            scores[name] = values.abs().mean(0)
        else:
            scores[name] = torch.rand(values.shape[1], generator=draw).to(values)
    if score == "sensitivity":
        scores = _sensitivities(model, names, x, y, size)
    for name, layer_scores in scores.items():
        scores[name] = layer_scores / layer_scores.sum().clamp_min(1e-30)
    return scores


def _sensitivities(
    model: nn.Module, names: Sequence[str], x: Any, y: Tensor, size: int
) -> dict[str, Tensor]:
    """|sum of dL/dM| over the rows, for each dynamic weight of each layer, [n].

    M goes from the mean of the kernels to their mix. Because dL/dW_k = dL/dW pi_k phi, we have
    dL/dM = sum_k dL/dW_k (W_k - mean W). So the gradients of the stored values are enough.
    """
    layers = {name: _pad(model, name) for name in names}
    totals = {name: torch.zeros_like(layer.dynamic[0]) for name, layer in layers.items()}
    inputs = as_inputs(x)
    for first in range(0, len(y), size):
        batch = {name: values[first : first + size] for name, values in inputs.items()}
        with torch.enable_grad():
            logits = logits_in(call_model(model, None, batch))
            loss = cross_entropy(logits, y[first : first + size], reduction="sum")
            parameters = [layer.dynamic.requires_grad_() for layer in layers.values()]
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        for (name, layer), grad in zip(layers.items(), grads, strict=True):
            if grad is not None:  # [K, n]; None for a layer that did not run
                distance = layer.dynamic.detach() - layer.dynamic.detach().mean(0)
                totals[name] += (grad * distance).sum(0)
    return {name: total.abs() for name, total in totals.items()}


def _chosen(
    model: nn.Module,
    names: Sequence[str],
    scores: Mapping[str, Tensor],
    share: float,
    total: int,
    scope: str,
) -> dict[str, Tensor]:
    """For each layer, which of its dynamic weights stay dynamic: bool [n]."""
    if scope == "layer":
        masks: dict[str, Tensor] = {}
        for name in names:
            count = round(share * torch.Size(_pad(model, name).shape).numel())
            masks[name] = largest(scores[name], min(count, len(scores[name])))
        return masks
    all_scores = torch.cat([scores[name] for name in names])
    mask = largest(all_scores, min(round(share * total), len(all_scores)))
    sizes = [len(scores[name]) for name in names]
    return dict(zip(names, torch.split(mask, sizes), strict=True))


def _reduced(layer: Pad, stays: Tensor) -> Pad:
    """The layer after some of its dynamic weights have become static, at the mean of their
    kernels.
    """
    # A static value is multiplied by 2 - phi in a run, a dynamic one by phi. So a mean that moves
    # from the dynamic to the static values is scaled by phi / (2 - phi).
    phi = layer.phi().detach()
    flat = layer.base().detach() / (2 - phi)  # [N]
    means = layer.dynamic.detach().mean(0) * phi / (2 - phi)  # [n]
    flat = flat.index_copy(0, layer.place, means)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[layer.place[stays]] = True
    reduced = Pad(
        flat.view(layer.shape),
        layer.bias,
        mask.view(layer.shape),
        kernels=layer.kernels,
        hidden=layer.hidden,
        temperature=layer.temperature,
        moves=layer.moves,
    )
    placed_like(reduced, layer)
    with torch.no_grad():
        reduced.dynamic.copy_(layer.dynamic[:, stays])
        reduced.balance.copy_(layer.balance)
    reduced.attention.load_state_dict(layer.attention.state_dict())
    return reduced
