"""Finds the inputs that a network reads: those that its logits or scores depend on.

A row is recognised by its inputs. An input that the network does not read (`idx`, `ids`) would make
every row look new, so it is refused. The network runs once on two rows while every operation of
torch is watched. The result of an operation depends on everything that the operation reads, and so
does every tensor that shares its memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from offramp.errors import BadData
from offramp.networks.inputs import State, given
from offramp.networks.network import Network
from offramp.networks.walking import every_path
from offramp.plans.signature import INPUT, is_label

ROWS = 2
# Methods that pass the values of a tensor to code outside torch, such as NumPy.
ESCAPES = ("numpy", "tolist", "item", "__array__", "__dlpack__", "data_ptr")


def require_read(network: Network, inputs: State, what: str) -> None:
    """Check that the network reads all named inputs.

    Args:
        network: in eval mode.
        inputs: a batch of named tensors, on its device. A single input counts as read.
        what: the data in messages.

    Raises:
        BadData: it does not read one of them.
    """
    extra = extra_inputs(inputs, known_inputs(network))
    if not extra and len(inputs) > 1:
        extra = unread(lambda x: _outputs(network, x), inputs)
    if extra:
        raise BadData(unread_text(extra, list(inputs), what))


def unread_text(extra: Sequence[str], names: Sequence[str], what: str) -> str:
    """Make the message for inputs that nothing reads.

    Args:
        extra: their names, with or without x/.
        names: of all inputs, in the same way.
        what: the data.
    """
    shown = _listed(extra)
    reads = _listed([name for name in names if name not in extra]) or "other names, or none"
    return (
        f"{what} has the input {shown}, which the network does not read (it reads {reads}). Leave "
        f"it out of the data, "
        "because rows are recognised by their inputs. If it is the label, name it 'labels' or "
        "give (x, y)."
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name.removeprefix(INPUT + "/")) for name in names)


def known_inputs(network: Network) -> frozenset[str] | None:
    """The names of all inputs that the models take; None where one of them takes any name."""
    known = set[str]()
    for member in network.members:
        if member.cuts:
            for spec in member.inputs:
                if not is_label(spec.name.removeprefix(INPUT + "/")):
                    known.add(spec.name)
            continue
        keywords = _keywords(network.preprocess_of(member) or network.model_of(member))
        if keywords is None:
            return None
        for name in keywords:
            known.add(f"{INPUT}/{name}")
    return frozenset(known)


def extra_inputs(inputs: Iterable[str], known: frozenset[str] | None) -> list[str]:
    """Find inputs that are not known to the models.

    Args:
        inputs: names, such as x, x/0 or x/mask. Positional ones have no name that could be wrong.
        known: see `known_inputs`; None for any name.
    """
    if known is None:
        return []
    extra = list[str]()
    for name in inputs:
        is_keyword = "/" in name and not name.removeprefix(INPUT + "/").isdigit()
        if is_keyword and name not in known:
            extra.append(name)
    return extra


def _keywords(module: nn.Module) -> list[str] | None:
    """The names of the arguments of a module; None if it takes any, or if they are not known."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    names = list[str]()
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            return None
        names.append(parameter.name)
    return names


def unread(call: Callable[[State], Iterable[Tensor]], inputs: State) -> list[str]:
    """Find the inputs that do not affect the results of a call.

    Args:
        call: from named tensors to results.
        inputs: [B, ...] by name; two rows of them are used.

    Returns:
        The names of these inputs; none if `call` fails, because its caller reports the error later.
    """
    few = {name: value[:ROWS].clone() for name, value in inputs.items()}  # [2, ...]
    watched = _Dispatched(few)
    try:
        with torch.no_grad(), _Escapes(watched), watched:
            outputs = list(call(few))
    except Exception:  # the user's model can raise anything
        return []
    read = set(watched.asked)
    for value in outputs:
        read |= watched.behind(value)
    return [name for name in few if name not in read]


def _outputs(network: Network, inputs: State) -> list[Tensor]:
    """The logits of all exits and the scores of all gates."""
    outputs = []
    if not network.topology.is_chain:
        # Of too many paths only one would be walked, and an input may be read on another one.
        _ = network.topology.paths  # raises BadNetwork, and then nothing is known
        for _, node, seen in every_path(network, inputs):
            if seen.own is not None:
                outputs.append(seen.own)
            if node.name in network.gates:
                outputs.append(network.gate_of(node.name).score(seen))
        return outputs
    for _, logits, score in network.walk(given(inputs)):
        outputs.append(logits)
        if score is not None:
            outputs.append(score)
    return outputs


class _Dispatched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes for every tensor the inputs that it depends on, by the memory of the tensor."""

    def __init__(self, inputs: State) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Inputs whose values left torch. They may affect anything, so they count as read.
        self.asked: set[str] = set()
        self._marks: dict[int, set[str]] = {}  # the address of a memory -> names of inputs
        self._held: list[object] = []  # the memories, so that no new one gets the same address
        for name, value in inputs.items():
            self._mark(value, {name})

    def behind(self, value: Tensor) -> set[str]:
        """The inputs that a tensor depends on."""
        return self._marks.get(value.untyped_storage()._cdata, set())

    def _mark(self, value: Tensor, names: set[str]) -> None:
        storage = value.untyped_storage()
        self._held.append(storage)
        self._marks[storage._cdata] = self._marks.get(storage._cdata, set()) | names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation. What it makes or changes depends on everything that it reads."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        arguments = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        names = set[str]()
        for value in arguments:
            names |= self.behind(value)
        if names:
            results = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
            if not results:  # a number, such as that of `if mask.all():`
                self.asked |= names
            changed = arguments if func._schema.is_mutable else []
            for value in (*results, *changed):
                self._mark(value, names)
        return result


class _Escapes(TorchFunctionMode):
    """Notes which inputs leave torch."""

    def __init__(self, watched: _Dispatched) -> None:
        super().__init__()
        self._watched = watched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function. If it passes values out of torch, their inputs count as read."""
        if getattr(func, "__name__", "") in ESCAPES and args and isinstance(args[0], Tensor):
            self._watched.asked |= self._watched.behind(args[0])
        return func(*args, **(kwargs or {}))
