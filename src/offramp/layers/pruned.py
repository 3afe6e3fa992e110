"""Channels taken out for good, through Torch-Pruning's dependency graph (Fang et al., 2023).

    taylor      |sum of weight x gradient| over labelled rows (Molchanov et al., 2019)
    thinet      how badly the next layer is reconstructed without the channel (Luo et al., 2017)
    bn_scale    the scale of the batch norm behind the layer (Liu et al., 2017)
    magnitude   the norm of the channel's filters

Torch-Pruning finds which layers must lose channels together and takes them out; the importances
`taylor`, `bn_scale` and `magnitude` are its own. ThiNet has no maintained implementation: here it
is one more importance. Channels whose outputs the next layer reconstructs best without are taken
first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp._support.arguments import require
from offramp.errors import BadNetwork, InvalidArgument, MissingExtra
from offramp.layers._replacing import geometry, require_whole
from offramp.networks.inputs import as_inputs, call_model
from offramp.networks.taps import logits_in

__all__ = ["pruned", "resized"]

IMPORTANCES = ("taylor", "thinet", "bn_scale", "magnitude")
SAMPLES = 2000  # positions of the next layer's input on which ThiNet compares
KINDS = (nn.Conv2d, nn.Linear)


def pruned(
    model: nn.Module,
    chosen: Sequence[str],
    *,
    example: Any = None,
    data: Any = None,
    ratio: float = 0.5,
    importance: str = "taylor",
    round_to: int = 0,
) -> nn.Module:
    """A model with fewer output channels in the chosen layers, in place.

    Args:
        model: in eval mode.
        chosen: names of modules; convolutions and linear layers among them lose outputs.
        example: a small batch as the model takes it.
        data: labelled rows (x, y) for "taylor", rows (x, ...) for "thinet".
        ratio: the share of each layer's channels to take out.
        importance: taylor, thinet, bn_scale or magnitude.
        round_to: keep a multiple of so many channels; 0 keeps any number. Odd widths are slow on
            many engines: 8 is a good choice.

    Raises:
        MissingExtra: Torch-Pruning is not installed.
        InvalidArgument: a ratio that leaves no channel, an unknown importance, missing rows.
        BadNetwork: no layer can lose channels, or the model no longer runs.
    """
    _require(example, data, ratio, importance)
    require_whole("round_to", round_to, 0)
    tp = _library()
    modules = dict(model.named_modules())
    targets = {name: modules[name] for name in chosen if type(modules[name]) in KINDS}
    if not targets:
        raise BadNetwork("pruned takes channels out of Conv2d and Linear layers; none was matched")
    _require_channels(targets, ratio, round_to)
    first = _first(example)
    tied = _tied(model)
    with torch.no_grad():
        logits = _logits_shape(model, first)
    others = [m for m in model.modules() if type(m) in KINDS and m not in targets.values()]
    scores = _importance(tp, importance, model, data)
    # Gradients are needed for the graph, whatever the model's own wishes are.
    wishes = {name: value.requires_grad for name, value in model.named_parameters()}
    model.requires_grad_(True)
    try:
        pruner = tp.pruner.BasePruner(
            model,
            first,
            importance=scores,
            pruning_ratio=ratio,
            ignored_layers=others,
            round_to=round_to or None,
        )
        if importance == "taylor":
            _backward(model, data)
        pruner.step()
    except BadNetwork:
        raise
    except (RuntimeError, ValueError, IndexError, KeyError, AssertionError) as problem:
        why = str(problem).strip().splitlines()[:1]
        raise BadNetwork(
            f"Torch-Pruning cannot take channels out of these layers ({''.join(why)}). Name "
            "layers whose outputs are not added to others"
        ) from problem
    _require_tied(model, tied)
    model.zero_grad(set_to_none=True)
    for name, value in model.named_parameters():
        value.requires_grad_(wishes[name])
    _require_sound(model, first, logits, list(targets))
    return model


pruned.rewrites = True  # type: ignore[attr-defined]


def _library() -> Any:
    try:
        import torch_pruning
    except ImportError as problem:
        raise MissingExtra("torch-pruning", "prune", "the method 'pruned'") from problem
    return torch_pruning


def _require(example: Any, data: Any, ratio: float, importance: str) -> None:
    require("ratio", ratio, above=0, below=1)
    if importance not in IMPORTANCES:
        raise InvalidArgument(f"importance must be {', '.join(IMPORTANCES)}, got {importance!r}")
    if example is None:
        raise InvalidArgument(
            "the method 'pruned' needs example=, a small batch as the model takes it"
        )
    if data is None and importance in ("taylor", "thinet"):
        raise InvalidArgument(f"importance={importance!r} needs data=(x, y), some rows with labels")


def _require_channels(targets: dict[str, nn.Module], ratio: float, round_to: int) -> None:
    """Raise InvalidArgument where a layer would keep no channel."""
    for name, layer in targets.items():
        width = _outputs(layer)
        kept = width - int(width * ratio)
        if round_to:
            kept = kept // round_to * round_to
        if kept < 1:
            rounded = f" and round_to={round_to}" if round_to else ""
            raise InvalidArgument(
                f"ratio={ratio:g}{rounded} leaves none of the {width} channels of {name!r}"
            )


def _outputs(layer: nn.Module) -> int:
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels
    assert isinstance(layer, nn.Linear)
    return layer.out_features


def _first(example: Any) -> Tensor:
    values = list(as_inputs(example).values())
    if len(values) != 1:
        raise InvalidArgument(f"the method 'pruned' takes models of one input, got {len(values)}")
    return values[0]


def _importance(tp: Any, name: str, model: nn.Module, data: Any) -> Callable[..., Any]:
    if name == "taylor":
        made: Callable[..., Any] = tp.importance.GroupTaylorImportance()
    elif name == "bn_scale":
        made = tp.importance.BNScaleImportance()
    elif name == "magnitude":
        made = tp.importance.GroupMagnitudeImportance(p=2)
    else:
        made = Reconstruction(tp, model, data)
    return made


def _backward(model: nn.Module, data: Any) -> None:
    """Gradients of the cross-entropy over the rows."""
    x = data[0]
    y = torch.as_tensor(data[1])
    logits = logits_in(call_model(model, None, as_inputs(x)))
    if logits.dim() != 2 or y.shape != logits.shape[:1] or int(y.max()) >= logits.shape[1]:
        raise BadNetwork(
            f"importance='taylor' needs a classifier that gives logits [B, C] and a label for each "
            f"row, got {tuple(logits.shape)} and labels {tuple(y.shape)} up to {int(y.max())}"
        )
    nn.functional.cross_entropy(logits, y).backward()  # type: ignore[no-untyped-call]


class Reconstruction:
    """ThiNet's importance of a layer's outputs: what the next convolution loses without them.

    For some positions of the next layer's output it holds what each input channel adds to it; the
    error of leaving out a set is the squared sum of what its channels add. Channels are left out
    greedily, always the one that makes the smallest error; the importance is the turn.
    """

    def __init__(self, tp: Any, model: nn.Module, data: Any) -> None:
        self.tp = tp
        self.added: dict[nn.Module, Tensor] = {}
        handles = [
            module.register_forward_hook(self._listen)
            for module in model.modules()
            if type(module) in KINDS
        ]
        try:
            with torch.no_grad():
                call_model(model, None, as_inputs(data[0]))
        finally:
            for handle in handles:
                handle.remove()

    def _listen(self, module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        """What each input channel adds to sampled values of the output: [samples, C]."""
        x = given[0]
        assert isinstance(module.weight, Tensor)
        weight = module.weight
        if isinstance(module, nn.Conv2d):
            if module.groups > 1:
                return
            columns = nn.functional.unfold(
                x, module.kernel_size, module.dilation, _padding(module), module.stride
            )  # [B, C k k, L]
            columns = columns.transpose(1, 2).flatten(0, 1)  # [B L, C k k]
        else:
            columns = x.flatten(0, -2)
        draw = torch.Generator().manual_seed(0)
        picked = torch.randint(len(columns), (SAMPLES,), generator=draw)
        filters = torch.randint(len(weight), (SAMPLES,), generator=draw)
        products = columns[picked] * weight.flatten(1)[filters]  # [samples, C k k]
        self.added[module] = products.view(SAMPLES, x_channels(module), -1).sum(2)

    def __call__(self, group: Any, **_: Any) -> Tensor | None:
        """A number for each channel of a group; None where no layer reads it."""
        for dependency, indices in group:
            module = dependency.target.module
            prune = dependency.handler
            reads = prune in (
                self.tp.prune_conv_in_channels,
                self.tp.prune_linear_in_channels,
            )
            if reads and module in self.added:
                return _turns(self.added[module][:, indices])
        return None


def x_channels(module: nn.Module) -> int:
    """The inputs of a convolution or a linear layer."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels
    assert isinstance(module, nn.Linear)
    return module.in_features


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    if isinstance(conv.padding, str):
        raise InvalidArgument("importance='thinet' needs convolutions with padding as numbers")
    high, wide = conv.padding
    return int(high), int(wide)


def _turns(added: Tensor) -> Tensor:
    """[samples, C] -> [C]: the turn in which each channel would be left out, the last ones last."""
    channels = added.shape[1]
    products = added.double().T @ added.double()  # [C, C]
    missing = torch.zeros(channels, dtype=torch.float64)  # product of each with what is left out
    left = torch.ones(channels, dtype=torch.bool)
    turns = torch.zeros(channels)
    for turn in range(channels):
        error = products.diagonal() + 2 * missing  # beside a constant
        error[~left] = torch.inf
        worst = int(error.argmin())
        left[worst] = False
        missing += products[worst]
        turns[worst] = turn + 1
    return turns


def _logits_shape(model: nn.Module, x: Tensor) -> torch.Size | None:
    """The shape of what a model gives; None if it gives several things."""
    output = model(x)
    return output.shape if isinstance(output, Tensor) else None


def _tied(model: nn.Module) -> list[tuple[str, str]]:
    """Pairs of names of the same parameter."""
    first_names: dict[int, str] = {}
    pairs = list[tuple[str, str]]()
    for name, value in model.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(id(value), name)
        if first != name:
            pairs.append((first, name))
    return pairs


def _require_tied(model: nn.Module, pairs: Sequence[tuple[str, str]]) -> None:
    """Raise BadNetwork if weights that were the same are no longer the same."""
    after = dict(model.named_parameters(remove_duplicate=False))
    for first, second in pairs:
        if after.get(first) is not after.get(second):
            raise BadNetwork(
                f"{first!r} and {second!r} are the same weights; taking channels out of these "
                f"layers would untie them. Untie them first, or name other layers"
            )


def _require_sound(
    model: nn.Module, x: Tensor, logits: torch.Size | None, targets: Sequence[str]
) -> None:
    """Raise BadNetwork where the model fails after channels were taken out, or lost classes.

    Args:
        model: after channels were taken out.
        x: an example.
        logits: the shape that the model gave before.
        targets: the layers that were named.
    """
    try:
        with torch.no_grad():
            shape = _logits_shape(model, x)
        if shape != logits and shape is not None and logits is not None:
            raise BadNetwork(
                f"the model would give {tuple(shape)} instead of {tuple(logits)}: one of "
                f"{', '.join(list(targets)[-3:])} gives its answers. Leave that layer out of the "
                f"patterns"
            )
    except RuntimeError as problem:
        why = str(problem).strip().splitlines()[0]
        raise BadNetwork(
            f"without these channels the model no longer runs ({why}). Name layers whose "
            "outputs are not added to others, such as the first one of each block"
        ) from problem


def resized(dense: nn.Module, *, inputs: int, outputs: int) -> nn.Module:
    """A new plain layer of the same kind with other widths: how a pruned model is built again.

    Args:
        dense: a Conv2d, Linear or BatchNorm2d.
        inputs: channels that come in.
        outputs: channels that go out.

    Raises:
        BadNetwork: another kind of layer.
        InvalidArgument: widths that are none, or that the groups do not divide.
    """
    require_whole("inputs", inputs, 1)
    require_whole("outputs", outputs, 1)
    tensor = next(dense.parameters(), None)
    index: dict[str, Any] = (
        {} if tensor is None else {"device": tensor.device, "dtype": tensor.dtype}
    )
    made: nn.Module
    if type(dense) is nn.Conv2d:
        assert isinstance(dense, nn.Conv2d)
        if dense.groups == 1:
            groups = dense.groups
        else:
            groups = inputs // max(1, dense.weight.shape[1])
        if inputs % groups or outputs % groups:
            raise InvalidArgument(
                f"{inputs} and {outputs} channels do not divide by {groups} groups"
            )
        shape = {**geometry(dense), "groups": groups, "bias": dense.bias is not None}
        made = nn.Conv2d(inputs, outputs, **shape, **index)
    elif type(dense) is nn.Linear:
        assert isinstance(dense, nn.Linear)
        made = nn.Linear(inputs, outputs, dense.bias is not None, **index)
    elif type(dense) is nn.BatchNorm2d:
        assert isinstance(dense, nn.BatchNorm2d)
        made = nn.BatchNorm2d(outputs, dense.eps, dense.momentum, dense.affine, **index)
    else:
        raise BadNetwork(
            f"resized makes Conv2d, Linear and BatchNorm2d, got {type(dense).__name__}"
        )
    return made.train(dense.training)
