"""`adopt`: a network that was trained with exits of its own, made a Network without training.

Each exit of such a network is a module (its *head*) that reads what another module gave (its
*layer*). The model is cut after the layers, and the heads become the exits there: shared with the
model, not copied. A head that reads anything else, such as a sum of two layers or earlier answers,
is refused; docs/how-to/my-network-already-has-exits.md shows how to bring it.

Where nobody names layers and heads, one forward on the example finds them: a head is the outermost
module that gave one of the model's answers, and its layer is the module that gave the head's only
input, both as the very same tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offramp._support.find import find, unknown
from offramp.building.cutting import GateLike, cut
from offramp.errors import BadData, BadNetwork, InvalidArgument, OfframpError
from offramp.networks.inputs import State, as_inputs, call_model, copies, given, remedy
from offramp.networks.network import Network
from offramp.networks.nodes import Exit
from offramp.networks.taps import logits_name, plain_attention, tensors_of
from offramp.networks.wrappers import unwrapped

BAND = 1e-3  # of logits: far above rounding, far below what another head would give


def adopt(
    model: nn.Module,
    example: Any,
    *,
    exits: Mapping[str, str] | None = None,
    gate: GateLike | Mapping[str, GateLike] = "margin",
    preprocess: nn.Module | None = None,
    spec: str | None = None,
    length: Sequence[str] | str = (),
) -> Network:
    """Make a network of a model that was trained with exits of its own. Nothing is trained or
    copied.

    State-dict keys are `backbone.<your own keys>`; those of a head also stand under
    `exits.<layer>.head`, for the same tensors.

    Args:
        model: in eval mode. Its forward gives the logits [B, C] of all exits in a list, tuple or
            dict; or only the last ones, and then `exits` must name the others.
        example: a batch as the model (or its preprocessing) takes it, as for `cut`.
        exits: by layer the module that is the exit after it, such as {"blocks.0": "heads.0"}.
            Without it they are found by one forward on the example.
        gate: as in `cut`.
        preprocess: the preprocessing of the model.
        spec: how to build the model again, such as `offramp:resnet20`.
        length: as in `cut`.

    Returns:
        A network whose exits are the layers, and `backbone` for the last answer.

    Raises:
        BadNetwork: the exits cannot be found, or what is found answers otherwise than the model.
        UnknownName: the model has no such layer or head.
        InvalidArgument: `exits` is no mapping of names.
        BadData: the model fails on the example.

    Example:
        >>> class TwoExits(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.stem = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        ...         self.early = nn.Linear(8, 3)
        ...         self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        ...         self.late = nn.Linear(8, 3)
        ...     def forward(self, x):
        ...         h = self.stem(x)
        ...         return [self.early(h), self.late(self.body(h))]
        >>> adopt(TwoExits().eval(), torch.randn(4, 8)).topology.exits
        ('stem', 'backbone')
    """
    if not isinstance(model, nn.Module):
        raise BadNetwork(f"the model is a {type(model).__name__}, expected a torch.nn.Module")
    model, _ = unwrapped(model)
    _require_eval(model)
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
    inputs = copies(as_inputs(example, device))
    seen = _forward(model, preprocess, inputs)
    answers = _answers(seen.outputs)
    if exits is not None:
        _require_names(model, exits)
        _require_fitting(model, seen, exits)
        found = {layer: _Head(layer, head, None) for layer, head in exits.items()}
        last = logits_name(seen.outputs) or _last(seen, answers)
    else:
        found, last = _found(seen, answers)
    network = cut(
        model,
        example,
        at=list(found),
        exits={layer: head.exit() for layer, head in found.items()},
        gate=gate,
        preprocess=preprocess,
        spec=spec,
        length=length,
        logits=None if last is None or last == "y" else last.removeprefix("y/"),
    )
    _require_same(network, seen, found, inputs)
    return network


@dataclass(frozen=True)
class _Head:
    """An exit of the user's: the layer to cut after, its module, and which answer it gives if the
    forward tells.
    """

    layer: str
    module: str
    answer: str | None

    def exit(self) -> Exit:
        made: Exit = find("exits", "Adopted")(self.module)
        return made


@dataclass(frozen=True)
class _Call:
    """One call of a module in a forward. inputs: its tensors; output: its tensor, None where it
    gave several.
    """

    name: str
    inputs: tuple[Tensor, ...]
    output: Tensor | None
    start: int
    end: int


@dataclass(frozen=True)
class _Forward:
    """A forward on the example: every call in the order in which they ended, and the model's
    outputs by name.
    """

    calls: tuple[_Call, ...]
    outputs: Mapping[str, Tensor]

    def before(self, tensor: Tensor, start: int) -> _Call | None:
        """The call that gave this very tensor, of several the last that ended before a time."""
        gave = [call for call in self.calls if call.output is tensor and call.end < start]
        return gave[-1] if gave else None

    def gave(self, tensor: Tensor) -> list[_Call]:
        """The calls that gave this very tensor, the outermost first."""
        return [call for call in reversed(self.calls) if call.output is tensor]


def _forward(model: nn.Module, preprocess: nn.Module | None, inputs: State) -> _Forward:
    """Run the model once and look at every module."""
    calls = list[_Call]()
    starts = dict[str, list[int]]()
    clock = iter(range(10**9))

    def begins(name: str) -> None:
        starts.setdefault(name, []).append(next(clock))

    def ends(
        name: str, args: tuple[object, ...], kwargs: Mapping[str, object], output: object
    ) -> None:
        given = tensors_of([*args, *kwargs.values()], name).values()
        gave = list(tensors_of(output, name).values())
        only = gave[0] if len(gave) == 1 else None
        calls.append(_Call(name, tuple(given), only, starts[name].pop(), next(clock)))

    handles = []
    try:
        for name, module in model.named_modules():
            if not name:
                continue
            handles.append(module.register_forward_pre_hook(lambda _m, _x, name=name: begins(name)))
            hook = lambda _m, args, kwargs, output, name=name: ends(name, args, kwargs, output)  # noqa: E731
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        with torch.no_grad(), plain_attention():
            outputs = tensors_of(call_model(model, preprocess, inputs), "y")
    except OfframpError:
        raise
    except Exception as problem:  # whatever the user's code raises
        why = next(iter(str(problem).strip().splitlines()), type(problem).__name__).rstrip(".;")
        way = remedy(inputs, problem, "give a batch of its shape and type")
        raise BadData(f"the model fails on the example: {why}; {way}") from problem
    finally:
        for handle in handles:
            handle.remove()
    return _Forward(tuple(calls), outputs)


def _answers(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those outputs that can be logits [B, C]."""
    return {
        name: value
        for name, value in outputs.items()
        if value.dim() == 2 and value.is_floating_point()
    }


def _last(seen: _Forward, answers: Mapping[str, Tensor]) -> str | None:
    """Which answer is that of the whole model; None where there is none.

    It is the one whose layer ended last. What a head reads may be computed in forward itself, and
    then its layer is not
    known: such an answer counts as the last if it also comes last in what the model gives, or if
    the model goes on behind all layers that are known.
    """
    ends = dict[str, int]()
    for name, answer in answers.items():
        layer = _layer(seen, seen.gave(answer))
        if layer is not None:
            ends[name] = layer[0].end
    unknown_layers = [name for name in answers if name not in ends]
    final = next(reversed(list(answers)), None)
    if final in unknown_layers:
        return final
    with_head = [name for name in unknown_layers if seen.gave(answers[name])]
    if len(with_head) == 1 and ends and _goes_on(seen, answers, max(ends.values())):
        return with_head[0]
    return max(ends, key=ends.__getitem__, default=final)


def _goes_on(seen: _Forward, answers: Mapping[str, Tensor], end: int) -> bool:
    """Whether a module that is no head, nor within one, began after a time."""
    heads = set[str]()
    for answer in answers.values():
        heads.update(call.name for call in seen.gave(answer)[:1])
    for call in seen.calls:
        within = any(call.name == head or call.name.startswith(f"{head}.") for head in heads)
        if call.start > end and not within:
            return True
    return False


def _layer(seen: _Forward, heads: Sequence[_Call]) -> tuple[_Call, _Call] | None:
    """The layer behind one of some nested heads, and that head: the outermost whose input is a
    layer's output.
    """
    for head in heads:
        if len(head.inputs) != 1:
            continue
        layer = seen.before(head.inputs[0], head.start)
        if layer is not None and not layer.name.startswith(f"{heads[0].name}."):
            return layer, head
    return None


def _found(seen: _Forward, answers: Mapping[str, Tensor]) -> tuple[dict[str, _Head], str]:
    """The exits but the last by the layer to cut after, and the name of the last answer. Raises
    BadNetwork.
    """
    if len(answers) < 2:
        given = ", ".join(
            f"{name.removeprefix('y/')} {list(value.shape)}" for name, value in seen.outputs.items()
        )
        raise BadNetwork(
            f"forward must give the logits [B, C] of two or more exits, got "
            f"{given or 'no tensor'}. Name the exits: "
            "adopt(..., exits={layer: head})."
        )
    widths = {name.removeprefix("y/"): value.shape[1] for name, value in answers.items()}
    if len(set(widths.values())) > 1:
        raise BadNetwork(
            f"all exits must answer with one number of classes, got {widths}. Name the exits: "
            "adopt(..., exits={layer: head})."
        )
    last = _last(seen, answers)
    assert last is not None
    found = dict[str, _Head]()
    for name in answers:
        if name == last:
            continue
        gave = seen.gave(answers[name])
        if not gave:
            raise BadNetwork(
                f"answer {name.removeprefix('y/')!r} must be what a module of the model gives, "
                f"and it is computed in "
                "forward itself. Put its head into a module, or name it: adopt(..., exits={layer: "
                "head})."
            )
        layer = _layer(seen, gave)
        if layer is None:
            raise BadNetwork(
                f"the exit {gave[0].name!r} must read exactly what one module of the model gives. "
                f"Put what forward "
                "computes before it into a module. "
                "docs/how-to/my-network-already-has-exits.md shows exits that read more."
            )
        head = _Head(layer[0].name, layer[1].name, name)
        if head.layer in found:
            raise BadNetwork(
                f"two exits read {head.layer!r}: {found[head.layer].module!r} and "
                f"{head.module!r}. Name one of them: "
                "adopt(..., exits={layer: head})."
            )
        found[head.layer] = head
    return found, last


def _require_eval(model: nn.Module) -> None:
    if model.training:
        raise BadNetwork(
            "the model is in training mode, expected eval mode; call model.eval() first"
        )


def _require_names(model: nn.Module, exits: object) -> None:
    """Raise for `exits` that do not name modules of the model."""
    if not isinstance(exits, Mapping) or not exits:
        raise InvalidArgument(
            f"exits must be a mapping of layers to heads, such as {{'blocks.0': 'heads.0'}}, got "
            f"{exits!r}"
        )
    known = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    for name in (*exits.keys(), *exits.values()):
        if not isinstance(name, str):
            raise InvalidArgument(
                f"exits must name modules of the model, got a {type(name).__name__}"
            )
        if name not in known:
            raise unknown(name, known, "module of this model")


def _require_fitting(model: nn.Module, seen: _Forward, exits: Mapping[str, str]) -> None:
    """Raise BadNetwork for a head that cannot read what its layer gives."""
    for layer, head in exits.items():
        gave = [
            call.output for call in seen.calls if call.name == layer and call.output is not None
        ]
        if len(gave) != 1:
            continue  # `cut` says why there is no cut after this layer
        try:
            with torch.no_grad():
                model.get_submodule(head)(gave[0])
        except Exception as problem:  # whatever the user's code raises
            why = next(iter(str(problem).strip().splitlines()), type(problem).__name__).rstrip(".;")
            raise BadNetwork(f"the head {head!r} fails on what {layer!r} gives: {why}") from problem


def _require_same(
    network: Network, seen: _Forward, heads: Mapping[str, _Head], inputs: State
) -> None:
    """Raise BadNetwork where an exit answers otherwise than the model did, in its own forward."""
    with torch.no_grad():
        ours = dict(zip(network.topology.exits, network(given(copies(inputs))), strict=True))
    for layer, head in heads.items():
        if head.answer is None:
            continue
        theirs = seen.outputs[head.answer]
        if not torch.allclose(ours[layer], theirs, rtol=BAND, atol=BAND, equal_nan=True):
            apart = float((ours[layer] - theirs).abs().max())
            raise BadNetwork(
                f"the exit after {layer!r} must answer as the model does, and its logits differ "
                f"by up to {apart:.3g}. "
                "Name the exits: adopt(..., exits={layer: head})."
            )
