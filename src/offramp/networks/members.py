"""The user's models in a network: their names and cuts, and the features at their nodes.

It also has the dict that holds modules under any name.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.inputs import State, call_model, copies
from offramp.networks.taps import listening, logits_in, plain_attention, tapped
from offramp.plans.signature import INPUT, Input

BACKBONE = "backbone"  # the only member of a network that was cut, and the name of its last node
RESERVED = (INPUT, BACKBONE, "last")  # the raw input, and words that `reference` may name

SKIP = "skip"  # ways in which a model is taken apart: see `WholeModel`
UNROLLED = "unrolled"

Modules = Mapping[str, nn.Module] | nn.ModuleDict


def require_name(name: object) -> None:
    """Check the name of a member of a ladder, from the user or from a file.

    Args:
        name: to check.

    Raises:
        InvalidArgument: it has other characters than letters, digits, - and _, or another meaning.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_\-]+", name):
        raise InvalidArgument(
            f"a member is called {name!r}, expected letters, digits, - and _; name it otherwise"
        )
    if name in RESERVED:
        raise InvalidArgument(
            f"a member is called {name!r}, which has a meaning of its own here; name it otherwise"
        )
    # The models of a ladder are in an `nn.ModuleDict`, which refuses such names.
    if hasattr(nn.ModuleDict, name):
        raise InvalidArgument(
            f"a member is called {name!r}, which is a method of every torch module; name it "
            f"otherwise"
        )


@dataclass(frozen=True)
class WholeModel:
    """The one model of which all segments of a network are pieces.

    Attributes:
        spec: how to build it again, such as `offramp:resnet20`; None where only the user can.
        way: "skip" for `cut(..., skip=)`, "unrolled" for `unrolled`.
        units: the names or patterns of the units that rows may skip.
    """

    spec: str | None
    way: str
    units: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelSpec:
    """A model of the user: a member of a ladder, or the one model that was cut.

    Attributes:
        name: of the member; `backbone` for the one model that was cut.
        spec: how to build it again, such as `offramp:resnet20`; None where only the user can.
        cuts: modules after which it is cut, in the order in which they run.
        inputs: that a cut model was tried on; empty where nothing was cut.
        length: names of inputs [B, T, ...] whose T may differ from batch to batch.
        output: which of its outputs are the logits, as `tensors_of(output, "y")` names them; None
            where that is clear.
    """

    name: str
    spec: str | None = None
    cuts: tuple[str, ...] = ()
    inputs: tuple[Input, ...] = ()
    length: tuple[str, ...] = ()
    output: str | None = None

    def node(self, cut: str | None) -> str:
        """The name of the node after a cut.

        Args:
            cut: the name of a module; None for the end of the model.

        Returns:
            Such as `layer1` and `backbone`; in a ladder `member/layer1` and `member`.
        """
        if cut is None:
            return self.name
        if self.name == BACKBONE:
            return cut
        return f"{self.name}/{cut}"

    def nodes(self) -> tuple[str, ...]:
        """All nodes of this member, in order."""
        return tuple(self.node(cut) for cut in (*self.cuts, None))


class NamedModules(nn.ModuleDict):
    """A ModuleDict that takes any name.

    An `nn.ModuleDict` refuses names such as `blocks.5`, or `half` (a method of every module). The
    state-dict keys have the names unchanged: `exits.blocks.5.weight`.
    """

    def hang(self, name: str, module: nn.Module) -> None:
        """Put a module under a name. It replaces the one that has this name."""
        self._modules[name] = module

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        _local: Any,
        strict: bool,
        _missing: Any,
        unexpected: Any,
        _errors: Any,
    ) -> None:
        """Find unexpected keys. Torch's own method expects no dot in a name."""
        known = tuple(f"{prefix}{name}." for name in self._modules)
        if not strict:
            return
        for key in state_dict:
            if key.startswith(prefix) and not key.startswith(known):
                unexpected.append(key)


def outside_torch(modules: Iterable[object]) -> str | None:
    """Describe the first module that computes outside of torch.

    Args:
        modules: to search.

    Returns:
        Its attribute `outside_torch`; None where all of them are torch's.
    """
    for module in modules:
        kind = getattr(module, "outside_torch", None)
        if isinstance(kind, str):
            return kind
    return None


def held(modules: Modules) -> NamedModules:
    """Put modules into a ModuleDict that takes any name."""
    named = NamedModules()
    for name, module in modules.items():
        named.hang(name, module)
    return named


def digest(module: nn.Module) -> str | None:
    """Compute sixteen hex digits that identify the values of a module's parameters.

    Args:
        module: any.

    Returns:
        The digits; None for a module without parameters, which cannot be trained.
    """
    # In float64 on the CPU, so that a cast to a wider type or a move changes nothing.
    mark = hashlib.sha256()
    has_parameters = False
    for parameter in module.parameters():
        mark.update(parameter.detach().cpu().double().numpy().tobytes())
        has_parameters = True
    if not has_parameters:
        return None
    return mark.hexdigest()[:16]


def values_of(
    model: nn.Module, preprocess: nn.Module | None, member: ModelSpec, inputs: State
) -> dict[str, Any]:
    """Run a model and collect the features at its nodes.

    If a tapped module gives several tensors, the first one counts. Each is copied, because the next
    operation may work in place.

    Args:
        model: the user's.
        preprocess: makes the model's input; None where the inputs are ready.
        member: its name and cuts.
        inputs: [B, ...] by name.

    Returns:
        Features by node in the order of execution; the last are the logits of the model.

    Raises:
        BadNetwork: a tapped module ran twice or never, or gave no tensor.
    """
    inputs = copies(inputs)
    if not member.cuts:
        return {member.name: logits_in(call_model(model, preprocess, inputs), member.output)}
    values: dict[str, Any] = {}
    this_thread = threading.get_ident()

    def keep(cut: str, output: object) -> None:
        if threading.get_ident() != this_thread:
            return  # another thread runs the same model
        if member.node(cut) in values:
            raise BadNetwork(
                f"module {cut!r} runs more than once in a forward pass; cut where a module runs "
                f"once"
            )
        leaves = list(tapped(output, cut).values())
        if not leaves:
            raise BadNetwork(
                f"module {cut!r} gives no tensor, expected one [B, ...]; cut elsewhere"
            )
        values[member.node(cut)] = leaves[0].clone()  # [B, ...]

    modules = {cut: model.get_submodule(cut) for cut in member.cuts}
    with listening(modules, keep), plain_attention():
        output = call_model(model, preprocess, inputs)
    for cut in member.cuts:
        if member.node(cut) not in values:
            raise BadNetwork(
                f"module {cut!r} did not run in a forward pass; cut where every input passes"
            )
    values[member.name] = logits_in(output, member.output)
    return values
