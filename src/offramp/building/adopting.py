"""`adopt`: make a Network of a model that was trained with exits of its own, without training.

Each exit of such a model is a module (its *head*) that reads the output of another module (its
*layer*). The model is cut after the layers, and the heads become the exits there: shared with the
model, not copied. A head that reads anything else, such as a sum of two layers or earlier answers,
is refused; docs/how-to/my-network-already-has-exits.md shows how to bring it.

If the user does not name layers and heads, one forward on the example finds them. A head is the
outermost module whose output is one of the model's answers. Its layer is the module whose output is
the head's only input. Both are recognised because they are the very same tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from offramp._support.find import find, unknown
from offramp.building.cutting import GateLike, cut
from offramp.building.routing import reason_of
from offramp.errors import BadData, BadNetwork, InvalidArgument, OfframpError
from offramp.networks.inputs import State, as_inputs, call_model, copies, given, remedy
from offramp.networks.network import Network
from offramp.networks.nodes import Exit
from offramp.networks.taps import logits_name, plain_attention, tensors_of
from offramp.networks.wrappers import unwrapped

BAND = 1e-3  # tolerance of logits: far above rounding, far below the difference of two heads
NAME_THEM = "Name the exits: adopt(..., exits={layer: head})."


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

    State-dict keys are `backbone.<your own keys>`. Those of a head also appear under
    `exits.<layer>.head`, for the same tensors.

    Args:
        model: in eval mode. Its forward gives the logits [B, C] of all exits in a list, tuple or
            dict; or only the last ones, and then `exits` must name the others.
        example: a batch as the model (or its preprocessing) takes it, as for `cut`.
        exits: by layer the module that is the exit after it, such as {"blocks.0": "heads.0"}.
            Without it, one forward on the example finds the exits.
        gate: as in `cut`.
        preprocess: the preprocessing of the model.
        spec: how to build the model again, such as `offramp:resnet20`.
        length: as in `cut`.

    Returns:
        A network whose exits are the layers, and `backbone` for the last answer.

    Raises:
        BadNetwork: the exits cannot be found, or answer differently from the model.
        UnknownName: the model has no layer or head with this name.
        InvalidArgument: `exits` is not a mapping of names.
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
        raise BadNetwork(f"the model must be a torch.nn.Module, got a {type(model).__name__}")
    model, _ = unwrapped(model)
    if model.training:
        raise BadNetwork("the model must be in eval mode. Call model.eval() first")
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else None
    inputs = copies(as_inputs(example, device))

    # Run the model once, and find the heads and the name of the last answer.
    forward = _forward(model, preprocess, inputs)
    answers = _answers(forward.outputs)
    last: str | None
    if exits is None:
        heads, last = _heads(forward, answers)
    else:
        _require_names(model, exits)
        _require_fitting(model, forward, exits)
        heads = {layer: _Head(layer, head, None) for layer, head in exits.items()}
        last = logits_name(forward.outputs) or _last(forward, answers)

    # Cut after the layers, with the heads as exits. The names of outputs are `y`, or `y/<key>`.
    logits = None if last is None or last == "y" else last.removeprefix("y/")
    network = cut(
        model,
        example,
        at=list(heads),
        exits={layer: head.exit() for layer, head in heads.items()},
        gate=gate,
        preprocess=preprocess,
        spec=spec,
        length=length,
        logits=logits,
    )
    _require_same(network, forward, heads, inputs)
    return network


@dataclass(frozen=True)
class _Head:
    """An exit of the user's model.

    Attributes:
        layer: name of the module to cut after.
        module: name of the module that answers.
        answer: name of its answer among the model's outputs; None if it is not known.
    """

    layer: str
    module: str
    answer: str | None

    def exit(self) -> Exit:
        exit_: Exit = find("exits", "Adopted")(self.module)
        return exit_


@dataclass(frozen=True)
class _Call:
    """One call of a module in a forward.

    Attributes:
        name: of the module.
        inputs: its tensors.
        output: its tensor; None if it gave several.
        start: when it began; calls count their starts and ends as 0, 1, 2, ...
        end: when it ended.
    """

    name: str
    inputs: tuple[Tensor, ...]
    output: Tensor | None
    start: int
    end: int


@dataclass(frozen=True)
class _Forward:
    """A forward on the example.

    Attributes:
        calls: every call of a module, in the order in which they ended.
        outputs: the model's outputs by name.
    """

    calls: tuple[_Call, ...]
    outputs: Mapping[str, Tensor]

    def source(self, tensor: Tensor, start: int) -> _Call | None:
        """The call that gave this very tensor before a time; the last one if there are several."""
        for call in reversed(self.calls):
            if call.output is tensor and call.end < start:
                return call
        return None

    def sources(self, tensor: Tensor) -> list[_Call]:
        """The calls that gave this very tensor, the outermost first."""
        return [call for call in reversed(self.calls) if call.output is tensor]


def _forward(model: nn.Module, preprocess: nn.Module | None, inputs: State) -> _Forward:
    """Run the model once with two hooks on every module, which note when its calls begin and
    end.
    """
    calls = list[_Call]()
    starts = dict[str, list[int]]()  # by module, those of its calls that have not ended
    clock = itertools.count()

    def begin(name: str, _module: nn.Module, _args: object) -> None:
        starts.setdefault(name, []).append(next(clock))

    def end(
        name: str,
        _module: nn.Module,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        output: object,
    ) -> None:
        taken = tensors_of([*args, *kwargs.values()], name).values()
        outputs = list(tensors_of(output, name).values())
        only = outputs[0] if len(outputs) == 1 else None
        calls.append(_Call(name, tuple(taken), only, starts[name].pop(), next(clock)))

    handles = []
    try:
        for name, module in model.named_modules():
            if not name:  # the model itself
                continue
            handles.append(module.register_forward_pre_hook(partial(begin, name)))
            handles.append(module.register_forward_hook(partial(end, name), with_kwargs=True))
        with torch.no_grad(), plain_attention():
            outputs = tensors_of(call_model(model, preprocess, inputs), "y")
    except OfframpError:
        raise
    except Exception as problem:  # the user's code can raise anything
        way = remedy(inputs, problem, "give a batch of its shape and type")
        raise BadData(f"the model fails on the example: {reason_of(problem)}; {way}") from problem
    finally:
        for handle in handles:
            handle.remove()
    return _Forward(tuple(calls), outputs)


def _answers(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs that can be logits [B, C]."""
    answers = dict[str, Tensor]()
    for name, value in outputs.items():
        if value.dim() == 2 and value.is_floating_point():
            answers[name] = value
    return answers


def _last(forward: _Forward, answers: Mapping[str, Tensor]) -> str | None:
    """The name of the answer of the whole model; None if there are no answers.

    It is the answer whose layer ended last. If the input of a head is computed in forward itself,
    its layer is not known. Such an answer is the last one in two cases: it is the last of the
    model's outputs, or it is the only such answer with a head and the model goes on after all known
    layers.
    """
    ends = dict[str, int]()  # by answer, the time when its layer ended
    for name, answer in answers.items():
        pair = _layer_and_head(forward, forward.sources(answer))
        if pair is not None:
            layer, _ = pair
            ends[name] = layer.end
    # The two cases in which the layer of the last answer is not known.
    final = next(reversed(list(answers)), None)
    unknown_layers = [name for name in answers if name not in ends]
    if final in unknown_layers:
        return final
    with_head = [name for name in unknown_layers if forward.sources(answers[name])]
    if len(with_head) == 1 and ends and _goes_on(forward, answers, max(ends.values())):
        return with_head[0]
    return max(ends, key=ends.__getitem__, default=final)


def _goes_on(forward: _Forward, answers: Mapping[str, Tensor], end: int) -> bool:
    """Whether any module began after a time, apart from heads and modules within them."""
    heads = set[str]()
    for answer in answers.values():
        sources = forward.sources(answer)
        if sources:
            heads.add(sources[0].name)
    # The first of the calls that gave an answer is the outermost: everything inside is a head.
    for call in forward.calls:
        if call.start > end and not _is_within(call.name, heads):
            return True
    return False


def _is_within(name: str, modules: Collection[str]) -> bool:
    """Whether a module is one of these, or within one of them."""
    for module in modules:
        if name == module or name.startswith(f"{module}."):
            return True
    return False


def _layer_and_head(forward: _Forward, heads: Sequence[_Call]) -> tuple[_Call, _Call] | None:
    """The layer and the head behind an answer.

    Several nested modules can give one tensor, such as a Sequential and its last Linear. The head
    is the outermost of them whose only input is the output of a layer outside.

    Args:
        forward: the forward.
        heads: the calls that gave the answer, the outermost first.
    """
    for head in heads:
        if len(head.inputs) != 1:
            continue
        layer = forward.source(head.inputs[0], head.start)
        if layer is not None and not layer.name.startswith(f"{heads[0].name}."):
            return layer, head
    return None


def _heads(forward: _Forward, answers: Mapping[str, Tensor]) -> tuple[dict[str, _Head], str]:
    """Find the exits of a model.

    Returns:
        The heads of all exits but the last, by the layer to cut after, and the name of the last
        answer.

    Raises:
        BadNetwork: there are fewer than two answers, or a head or its layer cannot be found.
    """
    if len(answers) < 2:
        shapes = list[str]()
        for name, value in forward.outputs.items():
            shapes.append(f"{name.removeprefix('y/')} {list(value.shape)}")
        raise BadNetwork(
            f"forward must give the logits [B, C] of two or more exits, got "
            f"{', '.join(shapes) or 'no tensor'}. {NAME_THEM}"
        )
    classes = {name.removeprefix("y/"): value.shape[1] for name, value in answers.items()}
    if len(set(classes.values())) > 1:
        raise BadNetwork(
            f"all exits must answer with one number of classes, got {classes}. {NAME_THEM}"
        )
    last = _last(forward, answers)
    assert last is not None
    # Every answer but the last one becomes an exit after its layer.
    heads = dict[str, _Head]()
    for name in answers:
        if name == last:
            continue
        sources = forward.sources(answers[name])
        if not sources:
            raise BadNetwork(
                f"answer {name.removeprefix('y/')!r} must be the output of a module of the model, "
                f"but it is computed in forward itself. Put its head into a module. {NAME_THEM}"
            )
        pair = _layer_and_head(forward, sources)
        if pair is None:
            raise BadNetwork(
                f"the exit {sources[0].name!r} must read exactly the output of one module of the "
                f"model. Put the computation before it into a module. "
                f"docs/how-to/my-network-already-has-exits.md shows exits that read more."
            )
        layer_call, head_call = pair
        head = _Head(layer_call.name, head_call.name, name)
        if head.layer in heads:
            raise BadNetwork(
                f"two exits read {head.layer!r}: {heads[head.layer].module!r} and "
                f"{head.module!r}. Name one of them: adopt(..., exits={{layer: head}})."
            )
        heads[head.layer] = head
    return heads, last


def _require_names(model: nn.Module, exits: object) -> None:
    """Raise unless `exits` is a mapping of names of the model's modules."""
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


def _require_fitting(model: nn.Module, forward: _Forward, exits: Mapping[str, str]) -> None:
    """Raise BadNetwork for a head that fails on the output of its layer."""
    for layer, head in exits.items():
        outputs = list[Tensor]()
        for call in forward.calls:
            if call.name == layer and call.output is not None:
                outputs.append(call.output)
        if len(outputs) != 1:
            continue  # `cut` explains why it cannot cut after this layer
        try:
            with torch.no_grad():
                model.get_submodule(head)(outputs[0])
        except Exception as problem:  # the user's code can raise anything
            raise BadNetwork(
                f"the head {head!r} fails on the output of {layer!r}: {reason_of(problem)}"
            ) from problem


def _require_same(
    network: Network, forward: _Forward, heads: Mapping[str, _Head], inputs: State
) -> None:
    """Raise BadNetwork if an exit answers differently from the model in its own forward."""
    with torch.no_grad():
        logits = dict(zip(network.topology.exits, network(given(copies(inputs))), strict=True))
    for layer, head in heads.items():
        if head.answer is None:  # forward does not give this answer
            continue
        expected = forward.outputs[head.answer]
        if not torch.allclose(logits[layer], expected, rtol=BAND, atol=BAND, equal_nan=True):
            difference = float((logits[layer] - expected).abs().max())
            raise BadNetwork(
                f"the exit after {layer!r} must answer as the model does, got logits that differ "
                f"by up to {difference:.3g}. {NAME_THEM}"
            )
