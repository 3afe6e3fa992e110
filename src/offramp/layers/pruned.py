"""Channel pruning through Torch-Pruning's dependency graph (Fang et al., 2023).

    taylor      |sum of weight x gradient| over labelled rows (Molchanov et al., 2019)
    thinet      the error of the next layer's output without the channel (Luo et al., 2017)
    bn_scale    the scale of the batch norm after the layer (Liu et al., 2017)
    magnitude   the norm of the channel's filters

Torch-Pruning finds the layers that must lose channels together, and removes the channels. The
importances `taylor`, `bn_scale` and `magnitude` are its own. ThiNet has no maintained
implementation, so it is implemented here, as one more importance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from offramp._support.arguments import require
from offramp._support.notices import say
from offramp._support.sentences import few, first_line
from offramp.errors import BadNetwork, InvalidArgument, MissingExtra
from offramp.layers._replacing import geometry, require_whole
from offramp.networks.inputs import as_inputs, call_model
from offramp.networks.taps import logits_in

__all__ = ["pruned", "resized"]

IMPORTANCES = ("taylor", "thinet", "bn_scale", "magnitude")
SAMPLES = 2000  # positions of the next layer's input on which ThiNet compares
KINDS = (nn.Conv2d, nn.Linear)
SHOWN = 4  # names in a message
# Layers that lose channels along with those, and what is kept of the norms.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d)
NORM_OPTIONS = ("eps", "momentum", "affine", "track_running_stats")


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
    """Remove output channels of some layers of a model, in place.

    Args:
        model: a model in eval mode.
        chosen: names of modules. The convolutions and linear layers among them lose outputs.
        example: a small batch as the model takes it.
        data: labelled rows (x, y) for "taylor", rows (x, ...) for "thinet".
        ratio: the share of each layer's channels to remove.
        importance: taylor, thinet, bn_scale or magnitude.
        round_to: keep a multiple of this number of channels; 0 keeps any number. Odd widths are
            slow on many engines; 8 is a good choice.

    Returns:
        The model.

    Raises:
        MissingExtra: Torch-Pruning is not installed.
        InvalidArgument: the ratio leaves no channel, the importance does not exist, or rows are
            missing.
        BadNetwork: no layer can lose channels, or the model does not run on the rows, before or
            after.
    """
    # 1. Check the arguments, and note the model's outputs and its tied weights.
    _require(example, data, ratio, importance)
    require_whole("round_to", round_to, 0)
    tp = _library()
    modules = dict(model.named_modules())
    targets = {name: modules[name] for name in chosen if type(modules[name]) in KINDS}
    if not targets:
        raise BadNetwork(
            "pruned removes channels of Conv2d and Linear layers, but none was matched"
        )
    _require_channels(targets, ratio, round_to)
    x = _single_input(example)
    tied = _tied(model)
    with _running("example"), torch.no_grad():
        logits = _logits_shape(model, x)
    before = {name: _outputs(layer) for name, layer in targets.items()}
    others = [m for m in model.modules() if type(m) in KINDS and m not in targets.values()]

    # 2. Prune. The dependency graph needs gradients of all parameters, also of frozen ones.
    scores = _importance(tp, importance, model, data)
    had_grad = {name: value.requires_grad for name, value in model.named_parameters()}
    model.requires_grad_(True)
    try:
        pruner = tp.pruner.BasePruner(
            model,
            x,
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
        why = first_line(problem)
        raise BadNetwork(
            f"Torch-Pruning cannot take channels out of these layers ({why}). Name layers whose "
            "outputs are not added to others"
        ) from problem

    # 3. Check the result, and freeze again what was frozen.
    _require_tied(model, tied)
    model.zero_grad(set_to_none=True)
    for name, value in model.named_parameters():
        value.requires_grad_(had_grad[name])
    _require_sound(model, x, logits, list(targets))
    _require_fewer(model, before)
    return model


pruned.rewrites = True  # type: ignore[attr-defined]


def _library() -> Any:
    try:
        import torch_pruning
    except ImportError as problem:
        raise MissingExtra("torch-pruning", "prune", "the method 'pruned'") from problem
    return torch_pruning


def _require(example: Any, data: Any, ratio: float, importance: str) -> None:
    """Raise InvalidArgument for an argument that is missing or out of its range."""
    require("ratio", ratio, above=0, below=1)
    if importance not in IMPORTANCES:
        raise InvalidArgument(
            f"importance must be one of {', '.join(IMPORTANCES)}, got {importance!r}"
        )
    if example is None:
        raise InvalidArgument(
            "example must be a small batch of the model's inputs for the method 'pruned', got None"
        )
    if data is None and importance in ("taylor", "thinet"):
        raise InvalidArgument(
            f"data must be rows with labels, (x, y), for importance={importance!r}, got None"
        )
    if data is not None:
        _require_rows(data, importance)


def _require_rows(data: Any, importance: str) -> None:
    """Raise InvalidArgument unless `data` has rows, and labels if the importance reads them."""
    if not isinstance(data, (tuple, list)) or not data:
        raise InvalidArgument(f"data must be rows with labels, (x, y), got {type(data).__name__}")
    count = min(len(values) for values in as_inputs(data[0]).values())
    if count == 0:
        raise InvalidArgument("data must have at least one row, got none")
    if importance != "taylor":
        return
    if len(data) < 2 or data[1] is None:
        raise InvalidArgument(
            "data must be rows with labels, (x, y), for importance='taylor', got no labels"
        )
    labels = torch.as_tensor(data[1])
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise InvalidArgument(f"labels must be whole numbers, got {labels.dtype}")
    if labels.shape != (count,):
        raise InvalidArgument(
            f"labels must be one for each of {count} rows, got the shape {tuple(labels.shape)}"
        )
    if int(labels.min()) < 0:
        raise InvalidArgument(f"labels must be at least 0, got {int(labels.min())}")


@contextmanager
def _running(rows: str) -> Iterator[None]:
    """Raise BadNetwork if the model fails on some rows inside this context."""
    try:
        yield
    except (RuntimeError, IndexError, TypeError) as problem:
        why = first_line(problem)
        raise BadNetwork(f"the model fails on the {rows} for the method 'pruned' ({why})") from (
            problem
        )


def _require_channels(targets: dict[str, nn.Module], ratio: float, round_to: int) -> None:
    """Raise InvalidArgument if a layer would keep no channel."""
    for name, layer in targets.items():
        width = _outputs(layer)
        kept = int(width * (1 - ratio))  # Torch-Pruning rounds down too
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


def _single_input(example: Any) -> Tensor:
    """The only input of an example."""
    values = list(as_inputs(example).values())
    if len(values) != 1:
        raise InvalidArgument(
            f"the model must have one input for the method 'pruned', got {len(values)}"
        )
    return values[0]


def _importance(tp: Any, name: str, model: nn.Module, data: Any) -> Callable[..., Any]:
    """The function that scores the channels of a group of layers."""
    importance: Callable[..., Any]
    if name == "taylor":
        importance = tp.importance.GroupTaylorImportance()
    elif name == "bn_scale":
        importance = tp.importance.BNScaleImportance()
    elif name == "magnitude":
        importance = tp.importance.GroupMagnitudeImportance(p=2)
    else:
        with _running("data"):
            importance = Reconstruction(tp, model, data)
    return importance


def _backward(model: nn.Module, data: Any) -> None:
    """Compute the gradients of the cross-entropy over the rows."""
    x = data[0]
    y = torch.as_tensor(data[1]).long()
    with _running("data"):
        logits = logits_in(call_model(model, None, as_inputs(x)))
    if logits.dim() != 2 or y.shape != logits.shape[:1] or int(y.max()) >= logits.shape[1]:
        raise BadNetwork(
            f"importance='taylor' needs a classifier that gives logits [B, C] and a label for each "
            f"row, got {tuple(logits.shape)} and labels {tuple(y.shape)} up to {int(y.max())}"
        )
    nn.functional.cross_entropy(logits, y).backward()  # type: ignore[no-untyped-call]


class Reconstruction:
    """ThiNet's importance of a layer's output channels: the error of the next layer without them.

    An output value of the next layer is a sum over its input channels. For some sampled values this
    class records the term of each channel. Without a set of channels, the squared error is the
    square of the sum of their terms. Channels are left out greedily: always the one with the
    smallest error. The importance of a channel is its place in this order.

    Args:
        tp: the module torch_pruning.
        model: the model.
        data: rows (x, ...) from which values are sampled.
    """

    def __init__(self, tp: Any, model: nn.Module, data: Any) -> None:
        self.tp = tp
        self.terms: dict[nn.Module, Tensor] = {}
        handles = []
        for module in model.modules():
            if type(module) in KINDS:
                handles.append(module.register_forward_hook(self._listen))
        try:
            with torch.no_grad():
                call_model(model, None, as_inputs(data[0]))
        finally:
            for handle in handles:
                handle.remove()

    def _listen(self, module: nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> None:
        """Record the terms of the input channels in sampled output values: [samples, C]."""
        x = arguments[0]
        assert isinstance(module.weight, Tensor)
        weight = module.weight  # [O, C, k, k] or [O, C]
        if isinstance(module, nn.Conv2d):
            if module.groups > 1:
                return
            columns = nn.functional.unfold(
                x, module.kernel_size, module.dilation, _padding(module), module.stride
            )  # [B, C k k, L]
            columns = columns.transpose(1, 2).flatten(0, 1)  # [B L, C k k]
        else:
            columns = x.flatten(0, -2)  # [rows, C]
        # an output value is the product of one position with one filter, both drawn at random
        draw = torch.Generator().manual_seed(0)
        positions = torch.randint(len(columns), (SAMPLES,), generator=draw)
        filters = torch.randint(len(weight), (SAMPLES,), generator=draw)
        products = columns[positions] * weight.flatten(1)[filters]  # [samples, C k k]
        self.terms[module] = products.view(SAMPLES, x_channels(module), -1).sum(2)

    def __call__(self, group: Any, **_: Any) -> Tensor | None:
        """The importance of each channel of a group, [C]; None if no layer reads the channels."""
        for dependency, indices in group:
            module = dependency.target.module
            prune = dependency.handler
            reads = prune in (
                self.tp.prune_conv_in_channels,
                self.tp.prune_linear_in_channels,
            )
            if reads and module in self.terms:
                return _turns(self.terms[module][:, indices])
        return None


def x_channels(module: nn.Module) -> int:
    """The inputs of a convolution or a linear layer."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels
    assert isinstance(module, nn.Linear)
    return module.in_features


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    """The padding of a convolution as numbers, for `unfold`."""
    if isinstance(conv.padding, str):
        raise InvalidArgument(
            f"convolutions must have padding as numbers for importance='thinet', got "
            f"{conv.padding!r}"
        )
    high, wide = conv.padding
    return int(high), int(wide)


def _turns(terms: Tensor) -> Tensor:
    """[samples, C] -> [C], from 1: the turn in which each channel is left out.

    With S left out, the error is the sum over samples of (sum of the terms in S)^2, which is the
    sum of P[i, j] over i, j in S, where P are the products of terms. To leave out channel c as well
    adds P[c, c] + 2 sum over S of P[c, s]. The channel with the smallest sum is next.
    """
    channels = terms.shape[1]
    products = terms.double().T @ terms.double()  # P, [C, C]
    with_left_out = torch.zeros(channels, dtype=torch.float64)  # sum over S of P[c, s], [C]
    remains = torch.ones(channels, dtype=torch.bool)
    turns = torch.zeros(channels)
    for turn in range(channels):
        error = products.diagonal() + 2 * with_left_out
        error[~remains] = torch.inf
        channel = int(error.argmin())
        remains[channel] = False
        with_left_out += products[channel]
        turns[channel] = turn + 1
    return turns


def _logits_shape(model: nn.Module, x: Tensor) -> torch.Size | None:
    """The shape of a model's output; None if the output is not a tensor."""
    output = model(x)
    if not isinstance(output, Tensor):
        return None
    return output.shape


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
                f"{first!r} and {second!r} are the same weights, and pruning would untie them. "
                f"Untie them first, or name other layers"
            )


def _require_sound(
    model: nn.Module, x: Tensor, logits: torch.Size | None, targets: Sequence[str]
) -> None:
    """Raise BadNetwork if the pruned model does not run, or lost classes.

    Args:
        model: the pruned model.
        x: an example.
        logits: the shape of the model's output before.
        targets: names of the pruned layers.
    """
    try:
        with torch.no_grad():
            shape = _logits_shape(model, x)
        if shape != logits and shape is not None and logits is not None:
            raise BadNetwork(
                f"the model must still give {tuple(logits)}, got {tuple(shape)}. One of "
                f"{', '.join(list(targets)[-3:])} gives the logits. Leave it out of the patterns"
            )
    except RuntimeError as problem:
        why = first_line(problem)
        raise BadNetwork(
            f"without these channels the model no longer runs ({why}). Name layers whose "
            "outputs are not added to others, such as the first one of each block"
        ) from problem


def _require_fewer(model: nn.Module, before: Mapping[str, int]) -> None:
    """Name the layers that kept all channels; raise BadNetwork if all did.

    Args:
        model: the pruned model.
        before: the output channels of the layers that were to lose some.
    """
    modules = dict(model.named_modules())
    unchanged = [name for name, width in before.items() if _outputs(modules[name]) == width]
    if not unchanged:
        return
    listed = few(unchanged, SHOWN)
    if len(unchanged) == len(before):
        raise BadNetwork(
            f"pruned can take no channel out of {listed}: a layer that was not named would have to "
            f"lose the same channels, such as one that is added to it, or a depth-wise "
            f"convolution. Name that layer too"
        )
    say(
        f"pruned left {listed} as they are: layers that were not named would have to lose the "
        f"same channels"
    )


def resized(dense: nn.Module, *, inputs: int, outputs: int) -> nn.Module:
    """Make a new layer of the same kind with other widths. A saved pruned model is built with it.

    Args:
        dense: a convolution, linear layer, norm or PReLU.
        inputs: input channels.
        outputs: output channels.

    Raises:
        BadNetwork: `dense` is another kind of layer.
        InvalidArgument: a width is below 1, or the groups do not divide it.
    """
    require_whole("inputs", inputs, 1)
    require_whole("outputs", outputs, 1)
    placement: dict[str, Any] = {}
    for tensor in (*dense.parameters(), *dense.buffers()):
        if tensor.is_floating_point():
            placement = {"device": tensor.device, "dtype": tensor.dtype}
            break
    layer: nn.Module
    if type(dense) in CONVOLUTIONS:
        layer = _resized_convolution(dense, inputs, outputs, placement)
    elif type(dense) is nn.Linear:
        assert isinstance(dense, nn.Linear)
        layer = nn.Linear(inputs, outputs, dense.bias is not None, **placement)
    elif type(dense) in NORMS:
        options = {name: getattr(dense, name) for name in NORM_OPTIONS}
        layer = type(dense)(outputs, **options, **placement)
    elif type(dense) is nn.GroupNorm:
        if outputs % dense.num_groups:
            raise InvalidArgument(f"{outputs} channels do not divide by {dense.num_groups} groups")
        layer = nn.GroupNorm(dense.num_groups, outputs, dense.eps, dense.affine, **placement)
    elif type(dense) is nn.LayerNorm:
        affine = dense.elementwise_affine
        has_bias = dense.bias is not None
        layer = nn.LayerNorm(outputs, dense.eps, affine, has_bias, **placement)
    elif type(dense) is nn.PReLU:
        layer = nn.PReLU(outputs, **placement)
    else:
        raise BadNetwork(
            f"resized makes convolutions, linear layers, norms and PReLU, got "
            f"{type(dense).__name__}"
        )
    return layer.train(dense.training)


def _resized_convolution(
    dense: nn.Module, inputs: int, outputs: int, placement: Mapping[str, Any]
) -> nn.Module:
    """A convolution with other widths. A depth-wise one stays depth-wise; another one keeps the
    number of its groups.
    """
    assert isinstance(dense, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d))
    groups = dense.groups
    if groups == dense.out_channels and groups > 1:  # as Torch-Pruning tells them
        groups = outputs
    if inputs % groups or outputs % groups:
        raise InvalidArgument(f"{inputs} and {outputs} channels do not divide by {groups} groups")
    options = geometry(dense)
    if isinstance(dense, nn.ConvTranspose2d):
        options["output_padding"] = dense.output_padding
    has_bias = dense.bias is not None
    kind: Any = type(dense)
    layer: nn.Module = kind(inputs, outputs, groups=groups, bias=has_bias, **options, **placement)
    return layer
