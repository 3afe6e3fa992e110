"""Which inputs a network reads: those that its answers or scores depend on.

A row is known by what the network reads of it. An input that it does not read (`idx`, `ids`) would
make every row look new, so it is refused. The network runs once on two rows while every operation
of torch is watched: what an operation makes of an input depends on it, and so does whatever shares
its memory.
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
# What hands the values of a tensor to code that torch does not see, such as NumPy.
ESCAPES = ("numpy", "tolist", "item", "__array__", "__dlpack__", "data_ptr")


def require_read(network: Network, inputs: State, what: str) -> None:
    """Raise BadData for named inputs that the network does not read.

    Args:
        network: a network in eval mode.
        inputs: a batch of named tensors, on its device; a single input is read.
        what: the data, for the sentence.
    """
    extra = extra_inputs(inputs, known_inputs(network))
    if not extra and len(inputs) > 1:
        extra = unread(lambda x: _outputs(network, x), inputs)
    if extra:
        raise BadData(unread_text(extra, list(inputs), what))


def unread_text(extra: Sequence[str], names: Sequence[str], what: str) -> str:
    """The sentence for inputs that nothing reads. Names may begin with x/."""
    shown = ", ".join(repr(name.removeprefix(INPUT + "/")) for name in extra)
    rest = ", ".join(repr(name.removeprefix(INPUT + "/")) for name in names if name not in extra)
    reads = rest or "other names, or none"
    return (
        f"{what} has the input {shown}, which the network does not read (it reads {reads}). Leave "
        f"it out of the data, "
        "because rows are recognised by their inputs. If it is the label, name it 'labels' or "
        "give (x, y)."
    )


def known_inputs(network: Network) -> frozenset[str] | None:
    """The names of all inputs that the models take; None where one of them takes any."""
    known = set()
    for member in network.members:
        if member.cuts:
            names = [
                one.name
                for one in member.inputs
                if not is_label(one.name.removeprefix(INPUT + "/"))
            ]
        else:
            keywords = _keywords(network.preprocess_of(member) or network.model_of(member))
            if keywords is None:
                return None
            names = [f"{INPUT}/{name}" for name in keywords]
        known.update(names)
    return frozenset(known)


def extra_inputs(inputs: Iterable[str], known: frozenset[str] | None) -> list[str]:
    """Those of the inputs that are not among the known ones; positional ones (x, x/0) have no name
    to ask for.
    """
    if known is None:
        return []
    return [name for name in inputs if name not in known and "/" in name and not name[2:].isdigit()]


def _keywords(module: nn.Module) -> list[str] | None:
    """The names of the arguments of a module; None for one that takes any, or does not tell."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(one.kind in (one.VAR_KEYWORD, one.VAR_POSITIONAL) for one in parameters):
        return None
    return [one.name for one in parameters]


def unread(call: Callable[[State], Iterable[Tensor]], inputs: State) -> list[str]:
    """The names of inputs on which nothing that `call` gives depends; none where `call` fails,
    which is told later.
    """
    some = {name: value[:ROWS].clone() for name, value in inputs.items()}
    watched = _Dispatched(some)
    try:
        with torch.no_grad(), _Escapes(watched), watched:
            outputs = list(call(some))
    except Exception:  # whatever the user's model raises; the caller runs it again and tells
        return []
    read = watched.asked.union(*(watched.behind(value) for value in outputs))
    return [name for name in some if name not in read]


def _outputs(network: Network, inputs: State) -> list[Tensor]:
    """The logits of all exits and the scores of all gates."""
    outputs = []
    if not network.topology.is_chain:
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
    """Notes for every tensor the inputs behind it, by the memory that it lies in."""

    def __init__(self, inputs: State) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # inputs whose values left torch: nobody knows what became of them
        self.asked: set[str] = set()
        self._marks: dict[int, set[str]] = {}
        self._held: list[object] = []  # while they are held, no other memory takes their place
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
        """Run an operation; what it makes or changes depends on all that it was given."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        taken = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        names = set().union(*map(self.behind, taken))
        if names:
            made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
            if not made:  # a number, such as that of `if mask.all():`
                self.asked |= names
            changed = taken if func._schema.is_mutable else []
            for value in (*made, *changed):
                self._mark(value, names)
        return result


class _Escapes(TorchFunctionMode):
    """Notes which inputs leave torch."""

    def __init__(self, watched: _Dispatched) -> None:
        super().__init__()
        self._watched = watched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function; values that it hands out of torch count as read."""
        if getattr(func, "__name__", "") in ESCAPES and args and isinstance(args[0], Tensor):
            self._watched.asked |= self._watched.behind(args[0])
        return func(*args, **(kwargs or {}))
